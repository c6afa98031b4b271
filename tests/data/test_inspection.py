"""`data inspect`: what is counted is what is there, with a tokenizer and without."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_dpo.cli import main
from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.inspection import PARTS, SAMPLED_LANGUAGES, count_texts, inspection, table
from qlora_dpo.data.languages import language_of
from qlora_dpo.data.packing import token_cost
from qlora_dpo.data.preferences import PreferencePair
from qlora_dpo.data.report import DataReport

ENGLISH = "The weather was nice yesterday, so that we went for a long walk along the river."
CHINESE = "昨天天气很好，所以我们沿着河边走了很长一段路，然后回家吃晚饭。"


def messages(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * bool(system) + turns


ROWS: list[Any] = [
    {"prompt": messages("One?"), "chosen": ENGLISH, "rejected": "No.", "category": "chat"},
    {"prompt": messages("One?"), "chosen": ENGLISH, "rejected": "No.", "category": "chat"},
    {
        "prompt": messages("One?", "Yes.", "Two?", system="Be kind."),
        "chosen": CHINESE,
        "rejected": "否",
        "category": "问答",
    },
    {"prompt": messages(ENGLISH), "chosen": CHINESE, "rejected": ENGLISH},
    {"prompt": messages("One?"), "chosen": " ", "rejected": "No."},
    "{",
]


@pytest.fixture
def file(write_jsonl: Callable[..., str]) -> str:
    return write_jsonl(ROWS)


def inspected(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str, code: int = 0) -> tuple[Any, str]:
    output = tmp_path / "found.json"
    assert main(["data", "inspect", *words, "--json", str(output)]) == code
    printed = capsys.readouterr()
    return (json.loads(output.read_text()) if code == 0 else None), printed.out + printed.err


def test_texts_are_counted(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, printed = inspected(capsys, tmp_path, file)
    assert (found["rows"], found["pairs"], found["unit"]) == (6, 4, "characters")
    assert found["refused"] == {"chosen: the answer is empty": 1, "json: broken JSON": 1}
    assert found["turns"] == {"2": 3, "4": 1}
    assert found["system_prompts"] == {"pairs": 1, "different": 1}
    assert found["languages"] == {"sampled": 4, "answers": {"en": 2, "zh": 2}, "answered_in_another": 1}
    assert found["duplicates"] == {"pairs": 1, "different_prompts": 3}
    assert found["categories"] == {"chat": 2, "": 1, "问答": 1}
    assert found["lengths"]["chosen"]["max"] == len(ENGLISH)
    assert "cut" not in found
    assert "1 x json: broken JSON" in printed
    assert "问答: 1 (25%)" in printed


def test_tokens_are_counted(file: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--tokenizer", str(model_folder), "--gradient_accumulation_steps", "3", "--num_train_epochs", "2")
    found, printed = inspected(capsys, tmp_path, file, *options, "--tokens_per_second", "10")
    from transformers import AutoTokenizer

    dataset = load_preference_dataset(file, tokenizer=AutoTokenizer.from_pretrained(model_folder), bad_rows="skip")
    shared = sum(token_cost(pair, "shared") for pair in dataset)
    assert found["unit"] == "tokens"
    assert found["sharing"]["tokens"] == shared
    assert found["sharing"]["without"] == shared + sum(len(pair.prompt_ids) for pair in dataset)
    for part, column in zip(PARTS, dataset.lengths(), strict=True):
        assert found["lengths"][part]["mean"] == pytest.approx(column.mean(), abs=0.05)
        assert sum(found["histogram"][part]) == len(dataset)
    steps = math.ceil(2 * math.ceil(len(dataset) / 3))
    assert found["training"]["steps"] == steps
    assert found["training"]["hours"] == pytest.approx(2 * shared / 10 / 3600, abs=1e-4)
    assert f"{steps:,} of 3 pairs (epochs: 2)" in printed


def test_what_the_limits_cut_is_counted(chatml: Any, write_jsonl: Callable[..., str]) -> None:
    rows = [{"prompt": "One? " * 40, "chosen": "yes " * 60, "rejected": "no " * 60}]
    rows.append({"prompt": "a", "chosen": "b", "rejected": "c"})
    same_start = {"prompt": "a", "chosen": "yes " * 90 + "b", "rejected": "yes " * 90 + "c"}
    dataset = load_preference_dataset(
        write_jsonl([*rows, same_start]), tokenizer=chatml, max_length=90, max_prompt_length=60, bad_rows="skip"
    )
    texts = [pair for pair in dataset.texts if isinstance(pair, PreferencePair)][:2]
    found = inspection(dataset.report, count_texts(texts), dataset)
    assert found["cut"] == {"prompts": 1, "answers": 2, "equal_after_cut": 1}
    assert "2 (50.0%), the end token is lost" in "\n".join(table(found))


def test_pictures_are_drawn(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Path) -> None:
    picture = tmp_path / "found.png"
    inspected(capsys, tmp_path, file, "--png", str(picture), "--model_name_or_path", str(model_folder))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_result_that_cannot_be_written_is_said(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, printed = inspected(capsys, tmp_path, file, "--png", str(tmp_path / "no" / "found.png"), code=74)
    assert "cannot write" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tokens_per_second", "10"), "would be ignored: no tokenizer counts the tokens"),
        (("--num_train_epochs", "0"), "--num_train_epochs 0.0: must be above 0"),
        (("--max_prompt_length", "9"), "--max_prompt_length 9 would be ignored"),
        (("--tokenizer", "a", "--model_name_or_path", "b"), "both name a tokenizer"),
    ],
)
def test_options_that_cannot_work_are_refused(
    words: tuple[str, ...], message: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed = inspected(capsys, tmp_path, file, *words, code=2)
    assert message in printed


def test_a_file_without_a_pair_is_refused(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed = inspected(capsys, tmp_path, write_jsonl([ROWS[4]]), "--dataset_format", "messages", code=65)
    assert "none of the 1 rows is a messages pair" in printed


def test_languages_are_those_of_a_sample() -> None:
    pairs = (PreferencePair(str(number), ENGLISH, "No.") for number in range(SAMPLED_LANGUAGES + 200))
    counts = count_texts(pairs)
    assert sum(counts.languages.values()) == SAMPLED_LANGUAGES
    assert counts.languages == {"en": SAMPLED_LANGUAGES}


@pytest.mark.parametrize(
    ("text", "language"),
    [(ENGLISH, "en"), (CHINESE, "zh"), ("Guten Tag, wie geht es Ihnen?", "de"), ("", "unknown"), ("2 + 2", "unknown")],
)
def test_languages_are_told_apart(text: str, language: str) -> None:
    assert language_of(text) == language


def test_real_pairs_are_inspected(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = inspected(capsys, tmp_path, str(shared_data / "belle_pairs_hh.jsonl"))
    assert found["pairs"] + sum(found["refused"].values()) == found["rows"] == 443
    assert max(found["languages"]["answers"], key=lambda name: found["languages"]["answers"][name]) == "zh"
    assert sum(found["categories"].values()) == found["pairs"]
    assert np.isclose(found["lengths"]["prompt"]["mean"], 76, rtol=0.3)


def test_a_report_without_tokens_needs_no_tokenizer() -> None:
    pair = PreferencePair("One?", "Yes.", "No.", origin="a:1")
    found = inspection(DataReport("a", "plaintext", 1, 1), count_texts([pair]), None)
    assert table({**found, "training": {"steps": 1, "pairs_per_step": 16, "epochs": 1.0, "hours": None}})
