"""From a file to a data set: every row accounted for, the cache sound, the division by prompt fair."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.data import pair_store
from qlora_dpo.data.building import TokenizingJob
from qlora_dpo.data.dataset import PairDataset, load_preference_dataset, split_by_prompt
from qlora_dpo.data.tokenization import EQUAL_AFTER_TRUNCATION, PairTokenizer
from qlora_dpo.errors import DataError, StorageError, UsageError

GOOD: list[dict[str, Any]] = [
    {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "id": i} for i in range(5)
]
BAD = [
    '{"prompt": "q"',
    {"prompt": "q", "chosen": "same", "rejected": "same"},
    {"prompt": "q", "chosen": None, "rejected": "x"},
    {"prompt": "q", "chosen": " ", "rejected": "x"},
]

Load = Callable[..., PairDataset]


@pytest.fixture
def load(chatml: Any, tmp_path: Path) -> Load:
    def load(source: str, **options: Any) -> PairDataset:
        return load_preference_dataset(source, **{"tokenizer": chatml, "cache_dir": tmp_path / "cache", **options})

    return load


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokenized").iterdir())


def test_pairs_come_back_as_they_were_tokenized(load: Load, write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = [{**row, "category": "c", "confidence": 0.5} for row in GOOD]
    path = write_jsonl(rows)
    dataset = load(path)
    assert len(dataset) == 5
    for number, (pair, row) in enumerate(zip(dataset, rows, strict=True), 1):
        assert pair.prompt_ids == PairTokenizer(chatml).render_prompt_ids(row["prompt"])
        assert chatml.decode(pair.chosen_ids) == row["chosen"] + "<|im_end|>"
        assert (pair.category, pair.confidence, pair.origin) == ("c", 0.5, f"{path}:{number}")
    assert dataset[-1] == dataset[4]
    assert dataset[1:3] == [dataset[1], dataset[2]]
    with pytest.raises(IndexError):
        dataset[5]
    prompt, chosen, rejected = dataset.lengths()
    assert [len(p.prompt_ids) for p in dataset] == prompt.tolist()
    assert [len(p.chosen_ids) for p in dataset] == chosen.tolist()
    assert [len(p.rejected_ids) for p in dataset] == rejected.tolist()


def test_every_row_is_a_pair_or_a_listed_refusal(load: Load, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([GOOD[0], *BAD, *GOOD[1:]])
    dataset = load(path, bad_rows="skip")
    report = dataset.report
    assert (report.rows_read, report.pairs, len(report.refused)) == (9, 5, 4)
    assert [row.origin for row in report.refused] == [f"{path}:{n}" for n in (2, 3, 4, 5)]
    assert report.refused_by_reason["rejected: the same answer as chosen"] == 1
    assert report.refused_by_reason["json: broken JSON"] == 1
    assert report.refused_file is not None
    listed = [json.loads(line) for line in report.refused_file.read_text().splitlines()]
    assert [row["origin"] for row in listed] == [row.origin for row in report.refused]
    text = "\n".join(report.summary())
    for part in (
        "5 pairs from 9 rows (plaintext)",
        "refused: 4 rows",
        "1 x chosen: null",
        str(report.refused_file),
    ):
        assert part in text


def test_bad_rows_fail_all_at_once_also_from_the_cache(load: Load, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([*GOOD, *(BAD * 6)])
    for _ in ("fresh", "cached"):
        with pytest.raises(DataError) as error:
            load(path)
        text = str(error.value)
        assert text.startswith(f"24 of 29 rows of {path} cannot be trained on:\n  {path}:6: json: broken JSON")
        assert f"{path}:25: " in text and f"{path}:26: " not in text and "... and 4 more" in text
        assert "--bad_rows skip" in text
    assert load(path, bad_rows="skip").report.from_cache


def test_a_file_of_bad_rows_only_is_an_error(load: Load, write_jsonl: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="none of the 4 rows"):
        load(write_jsonl(BAD), bad_rows="skip")
    with pytest.raises(DataError, match="1 of 1 rows"):
        load(write_jsonl(["{"]))


def test_a_pair_dropped_by_truncation_is_counted_and_does_not_fail(load: Load, write_jsonl: Callable[..., str]) -> None:
    long = {
        "prompt": "q",
        "chosen": "the same long start " * 9 + "a",
        "rejected": "the same long start " * 9 + "b",
    }
    report = load(write_jsonl([*GOOD, long]), max_length=60, max_prompt_length=50).report
    assert (report.rows_read, report.pairs, report.dropped_equal_after_truncation) == (6, 5, 1)
    assert [row.reason for row in report.refused] == [EQUAL_AFTER_TRUNCATION]


def test_repairs_and_truncation_are_counted(load: Load, write_jsonl: Callable[..., str]) -> None:
    start = "\n\nHuman: a long question\n\nHuman: and more of it\n\nAssistant: "
    report = load(
        write_jsonl([{"chosen": start + "yes, this is a long answer", "rejected": start + "no"}]),
        max_length=20,
        max_prompt_length=15,
    ).report
    assert list(report.repaired.values()) == [1]
    assert (report.truncated_prompts, report.truncated_completions) == (1, 1)
    assert len(report.summary()) == 4


def test_the_second_load_is_the_first_from_the_cache(load: Load, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([*GOOD, *BAD])
    first, second = load(path, bad_rows="skip"), load(path, bad_rows="skip")
    assert (first.report.from_cache, second.report.from_cache) == (False, True)
    assert list(first) == list(second)
    assert first.fingerprint == second.fingerprint
    assert first.report.refused == second.report.refused
    assert first.report.rows_read == second.report.rows_read


@pytest.mark.parametrize(
    "change",
    [{"max_length": 900}, {"max_prompt_length": 100}, {"max_samples": 3}, {"dataset_format": "plaintext"}],
)
def test_other_options_are_another_store(
    load: Load, write_jsonl: Callable[..., str], change: dict[str, Any], tmp_path: Path
) -> None:
    path = write_jsonl(GOOD)
    load(path)
    assert not load(path, **change).report.from_cache
    assert len(stores(tmp_path)) == 2


def test_another_file_template_or_tokenizer_is_another_store(
    load: Load, write_jsonl: Callable[..., str], chatml: Any, tokenizers: Callable[[str], Any]
) -> None:
    path = write_jsonl(GOOD)
    first = load(path)
    other = copy.deepcopy(chatml)
    other.chat_template = other.chat_template.replace("Be helpful.", "Be brief.")
    fingerprints = {first.fingerprint}
    for tokenizer in (other, tokenizers("llama3")):
        dataset = load(path, tokenizer=tokenizer)
        assert not dataset.report.from_cache
        fingerprints.add(dataset.fingerprint)
    write_jsonl(GOOD[:4])
    changed = load(path)
    assert not changed.report.from_cache
    assert len(fingerprints | {changed.fingerprint}) == 4


@pytest.mark.parametrize("name", [pair_store.PAIRS_FILE, pair_store.REFUSED_FILE, pair_store.MANIFEST_FILE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_store_is_built_again(
    load: Load, write_jsonl: Callable[..., str], tmp_path: Path, name: str, damage: str
) -> None:
    path = write_jsonl([*GOOD, BAD[1]])
    first = list(load(path, bad_rows="skip"))
    (folder,) = stores(tmp_path)
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
    if damage != "delete":
        (folder / name).write_bytes(content[: len(content) // 2] if damage == "truncate" else content)
    again = load(path, bad_rows="skip")
    assert not again.report.from_cache
    assert list(again) == first
    assert load(path, bad_rows="skip").report.from_cache
    assert stores(tmp_path) == [folder]


def test_a_failed_build_leaves_nothing(
    load: Load, write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = write_jsonl(GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(pair_store.SampleWriter, "add_samples", fail)
        with pytest.raises(StorageError, match=r"No space left on device; .*--cache_dir"):
            load(path)
    assert stores(tmp_path) == []
    assert len(load(path)) == 5


def test_a_cache_folder_that_cannot_be_is_one_sentence(load: Load, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl(GOOD)
    with pytest.raises(StorageError, match="QLORA_DPO_CACHE"):
        load(path, cache_dir=path)


def test_two_processes_may_build_the_same_store(
    load: Load, write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes while this one is at work."""
    path = write_jsonl(GOOD)
    store, other = TokenizingJob._store, []

    def overtaken(self: TokenizingJob, *arguments: Any) -> None:
        monkeypatch.setattr(TokenizingJob, "_store", store)
        other.append(load(path))
        store(self, *arguments)

    monkeypatch.setattr(TokenizingJob, "_store", overtaken)
    assert list(load(path)) == list(other[0])
    assert len(stores(tmp_path)) == 1


def test_the_cache_folder_comes_from_the_environment(
    load: Load, write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "env"))
    load(write_jsonl(GOOD), cache_dir=None)
    assert (tmp_path / "env" / "tokenized").is_dir()


def test_max_samples_takes_the_first_rows(load: Load, write_jsonl: Callable[..., str]) -> None:
    report = load(write_jsonl([*GOOD, *BAD]), max_samples=3).report
    assert (report.rows_read, report.pairs) == (3, 3)


def test_the_format_shows_after_bad_rows(load: Load, write_jsonl: Callable[..., str]) -> None:
    report = load(write_jsonl([*BAD[:3], *GOOD]), bad_rows="skip").report
    assert (report.dataset_format, report.rows_read, report.pairs) == ("plaintext", 8, 5)


def test_messages_that_cannot_be_read_do_not_hide_the_format(load: Load, write_jsonl: Callable[..., str]) -> None:
    torn = GOOD[0] | {"chosen": "[{'role': 'user', 'conte"}
    report = load(write_jsonl([torn, *GOOD]), bad_rows="skip").report
    assert (report.dataset_format, report.pairs) == ("plaintext", len(GOOD))
    with pytest.raises(UsageError, match=r"cannot tell the format of the data by .*:1: chosen: begins as messages"):
        load(write_jsonl([torn]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset_format": "plain"}, "Did you mean plaintext"),
        ({"bad_rows": "ignore"}, "choose fail or skip"),
        ({"max_samples": 0}, "leaves no data"),
        ({"prompt_key": "question"}, "cannot tell the format"),
        ({"split": "test"}, "no split named 'test'"),
    ],
)
def test_options_that_cannot_work(
    load: Load, write_jsonl: Callable[..., str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        load(write_jsonl(GOOD), **options)


def test_column_names_are_configurable(load: Load, write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([{"q": "a", "good": "b", "bad": "c"}])
    assert len(load(path, prompt_key="q", chosen_key="good", rejected_key="bad")) == 1


def test_many_batches_read_as_one(load: Load, write_jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_dpo.data import building

    path = write_jsonl([*GOOD, BAD[0], *GOOD])
    whole = load(path, bad_rows="skip", cache_dir=Path(path).parent / "whole")
    monkeypatch.setattr(building, "_BATCH", 3)
    parts = load(path, bad_rows="skip")
    assert list(parts) == list(whole) == [parts[i] for i in range(len(parts))]
    assert parts.fingerprint == whole.fingerprint
    assert all((a == b).all() for a, b in zip(parts.lengths(), whole.lengths(), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_division_keeps_prompts_together(load: Load, write_jsonl: Callable[..., str], seed: int) -> None:
    rows = [{"prompt": f"p{i // 3}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(60)]
    dataset = load(write_jsonl(rows))
    train, evaluation = split_by_prompt(dataset, 0.2, seed)
    assert sorted(train + evaluation) == list(range(60))
    assert len(evaluation) == 12
    assert not {tuple(dataset[i].prompt_ids) for i in train} & {tuple(dataset[i].prompt_ids) for i in evaluation}
    assert split_by_prompt(dataset, 0.2, seed) == (train, evaluation)
    assert split_by_prompt(dataset, 0.2, seed + 1) != (train, evaluation)
    assert len(split_by_prompt(dataset, 0.2, seed, max_pairs=6)[1]) == 6
    assert split_by_prompt(dataset, 0.0, seed) == (list(range(60)), [])


def test_a_division_that_leaves_nothing_to_train_on_is_refused() -> None:
    for fraction in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match="fraction"):
            split_by_prompt([], fraction, 0)


def test_importing_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, qlora_dpo.data.dataset, qlora_dpo.data.templates;"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
