"""Records: blind candidates, verdicts that survive a kill, pairs that can be trained on."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.errors import DataError, StorageError, UsageError
from qlora_dpo.labeling.records import (
    Candidates,
    Record,
    Verdict,
    finish,
    load_candidates,
    majority,
    open_record,
    pending,
    read_candidates,
    read_verdicts,
    record_path,
)

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from pathlib import Path
from qlora_dpo.labeling.records import Record, Verdict
record = Record(Path(sys.argv[1]))
def verdict(key, detail={}):
    return Verdict(key, 0, 1, (), 1.0, "rules", "v1", "2026-01-01T00:00:00+00:00", None, detail)
"""
TURN = {"role": "user", "content": "w3 w4"}


def verdict(item: Candidates | str, chosen: int | None = 0, **changes: Any) -> Verdict:
    values: dict[str, Any] = {
        "key": item if isinstance(item, str) else item.key, "chosen": chosen,
        "rejected": None if chosen is None else 1 - chosen, "scores": (1.0, 0.5), "confidence": 0.8,
        "method": "rules", "version": "v1", "time": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Verdict(**values | changes)


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def test_generated_rows_keep_their_order_category_and_reference(tmp_path: Path) -> None:
    row = {"prompt": "p", "answers": ["b", "a", "b", " "], "category": "qa", "reference_answer": "a"}
    messages = {"prompt": [TURN], "answers": ["x", "y"], "reference_answer": ""}
    file = write(tmp_path / "c.jsonl", [row, messages])
    first, second = read_candidates(str(file))
    assert first == Candidates("p", ("b", "a"), "qa", "a", f"{file}:1")
    assert second == Candidates((TURN,), ("x", "y"), None, None, f"{file}:2")
    assert len(first.key) == 32 and first.key != Candidates("p", ("a", "b")).key


def test_the_order_of_a_pair_tells_nothing_and_repeats(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "yes", "rejected": "no"} for n in range(400)]
    swapped = [{"prompt": f"p{n}", "chosen": "no", "rejected": "yes"} for n in range(400)]
    first = load_candidates(str(write(tmp_path / "a.jsonl", rows)))
    assert [item.answers for item in first] == [
        item.answers for item in load_candidates(str(write(tmp_path / "b.jsonl", swapped)))
    ]
    assert 160 < sum(item.answers[0] == "yes" for item in first) < 240


def test_bad_rows_are_named_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "p", "answers": ["a", "b"]}
    bad = [
        {"prompt": "p", "answers": ["a", "a", ""]},
        {"prompt": "p", "answers": "a"},
        {"prompt": "p", "answers": ["a", 3]},
        {"prompt": "p", "answers": ["a", "\ud800"]},
        {"prompt": " ", "answers": ["a", "b"]},
        {"answers": ["a", "b"]},
        {"prompt": "p", "answers": ["a", "b"], "reference_answer": 3},
        "{broken",
    ]
    file = write(tmp_path / "c.jsonl", [good, *bad])
    rows = list(read_candidates(str(file)))
    assert [type(row) for row in rows] == [Candidates] + [RefusedRow] * 8
    assert [row.field for row in rows[1:] if isinstance(row, RefusedRow)] == [
        "answers", "answers", "answers[1]", "json", "prompt", "prompt", "reference_answer", "json",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"7 of 8 rows .*\n.*c.jsonl:3: answers: must be a list"):
        load_candidates(str(file))
    assert len(load_candidates(str(file), "skip")) == 1
    assert "7 of 8 rows are left out" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 of 1 rows"):
        load_candidates(str(write(tmp_path / "d.jsonl", bad[:1])), "skip")


def test_a_set_of_equal_answers_is_counted_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "answers": ["a", "b"]}, {"prompt": "q", "answers": ["a", "a", ""]}]
    assert len(load_candidates(str(write(tmp_path / "c.jsonl", rows)))) == 1
    assert "1 rows are left out, whose answers are all the same or empty" in capsys.readouterr().out
    with pytest.raises(DataError, match="fewer than two different answers"):
        load_candidates(str(write(tmp_path / "d.jsonl", rows[1:])))


def test_one_bad_row_among_a_thousand_is_named(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(1000)]
    rows[700] = {"prompt": "p", "chosen": "a"}
    with pytest.raises(DataError, match=r"1 of 1000 rows .*\n  .*c.jsonl:701: rejected: missing"):
        load_candidates(str(write(tmp_path / "c.jsonl", rows)))


def test_unknown_columns_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot tell the format"):
        load_candidates(str(write(tmp_path / "c.jsonl", [{"x": "y"}])))


def test_a_verdict_is_two_answers_or_a_tie() -> None:
    assert verdict("k", None).is_tie and not verdict("k", 1).is_tie
    for changes in ({"rejected": None}, {"chosen": 1, "rejected": 1}, {"confidence": 0.0}, {"confidence": 1.5}):
        with pytest.raises(ValueError, match=r"answers|confidence"):
            verdict("k", **changes)


def test_a_record_gives_back_what_was_added_the_last_verdict_winning(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / "r.labels.jsonl")
    record.add(verdict("k1"), verdict("k2", None, detail={"why": "“equal”"}))
    record.add(verdict("k1", 1), verdict("k1", annotator="ann"))
    expected = {
        ("k1", None): verdict("k1", 1),
        ("k2", None): verdict("k2", None, detail={"why": "“equal”"}),
        ("k1", "ann"): verdict("k1", annotator="ann"),
    }
    assert record.verdicts() == Record(record.file).verdicts() == read_verdicts(record.file) == expected
    record.retract("k1", "ann")
    del expected["k1", "ann"]
    assert record.verdicts() == Record(record.file).verdicts() == expected
    assert len(record.file.read_text().splitlines()) == 5


@pytest.mark.parametrize("torn", ['{"key": "k2", "cho', "{" * 10_000, " "])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "r.labels.jsonl"
    Record(file).add(verdict("k1"))
    whole = file.read_bytes()
    file.write_bytes(whole + torn.encode())
    assert read_verdicts(file).keys() == {("k1", None)}
    record = Record(file)
    assert file.read_bytes() == whole
    record.add(verdict("k2"))
    assert record.verdicts().keys() == {("k1", None), ("k2", None)}


def test_a_file_of_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    file = tmp_path / "r.labels.jsonl"
    file.write_bytes(b'{"key": "' + b"x" * 9000)
    assert Record(file).verdicts() == {} and file.read_bytes() == b""


@pytest.mark.parametrize("content", ["my notes", '{"key": "of another program"}', "1,2\n3,4", '{"key": 1}\n{"key'])
def test_a_record_that_is_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "r.labels.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=r"r\.labels\.jsonl"):
        Record(file)
    assert file.read_text() == content


def test_labels_replace_neither_their_source_nor_another_file(tmp_path: Path) -> None:
    source = write(tmp_path / "pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    before = source.read_bytes()
    (tmp_path / "hard.jsonl").hardlink_to(source)
    (tmp_path / "soft.jsonl").symlink_to(source)
    for name in ("pairs.jsonl", "hard.jsonl", "soft.jsonl"):
        with pytest.raises(UsageError, match="is read from"):
            open_record(tmp_path / name, "rules", str(source))
    with pytest.raises(UsageError, match="was not written by this command"):
        open_record(source, "rules", "org/elsewhere")
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "hard.jsonl", "soft.jsonl"}
    assert source.read_bytes() == before


@pytest.mark.parametrize("line", ["[]", "{}", "nonsense", json.dumps({"key": "k", "chosen": 0, "scores": []})])
def test_a_line_that_is_no_verdict_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "r.labels.jsonl"
    Record(file).add(verdict("k1"))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"r.labels.jsonl:2: not a verdict"):
        Record(file)


def test_a_record_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="name another"):
        Record(tmp_path / "file" / "r.labels.jsonl")
    with pytest.raises(StorageError, match="cannot be read"):
        read_verdicts(tmp_path / "missing")


def test_several_writers_lose_no_line(tmp_path: Path) -> None:
    file = tmp_path / "r.labels.jsonl"
    code = WRITER + "for number in range(50): record.add(verdict(f'{sys.argv[2]}{number}', {'text': 'x' * 5000}))"
    others = [subprocess.Popen([sys.executable, "-c", code, str(file), name], cwd=ROOT) for name in "ab"]
    record = Record(file)

    def write_some(name: str) -> None:
        for number in range(50):
            record.add(verdict(f"{name}{number}"))

    threads = [threading.Thread(target=write_some, args=(name,)) for name in "cd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [other.wait(60) for other in others] == [0, 0]
    assert {key for key, _ in record.verdicts()} == {f"{name}{n}" for name in "abcd" for n in range(50)}


def test_a_line_that_another_process_is_writing_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "r.labels.jsonl"
    record = Record(file)
    added = threading.Thread(target=lambda: record.add(verdict("k2")))
    line = json.dumps(asdict(verdict("k1"))) + "\n"
    with file.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(line[:50])
        other.flush()
        added.start()
        added.join(0.3)
        other.write(line[50:])
    added.join(20)
    assert [key for key, _ in record.verdicts()] == ["k1", "k2"]


def test_a_killed_writer_leaves_whole_verdicts(tmp_path: Path) -> None:
    file = tmp_path / "r.labels.jsonl"
    code = WRITER + (
        "number = len(record.verdicts())\n"
        "while True: record.add(verdict(f'k{number}')); number += 1; print(number, flush=True)"
    )
    told = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(20):
            told = int(process.stdout.readline())
        process.kill()
        process.wait(20)
        process.stdout.close()
        assert {f"k{n}" for n in range(told)} <= {key for key, _ in Record(file).verdicts()}
    assert told >= 40


def test_what_is_pending_depends_on_version_and_annotator() -> None:
    items = [Candidates("p", ("a", "b")), Candidates("q", ("a", "b")), Candidates("p", ("a", "b"), origin="again")]
    verdicts = {(items[0].key, None): verdict(items[0]), (items[1].key, "ann"): verdict(items[1])}
    assert pending(items, {}) == items[:2]
    assert pending(items, verdicts, version="v1") == [items[1]]
    assert pending(items, verdicts, version="v2") == items[:2]
    assert pending(items, verdicts, annotator="ann") == [items[0]]


def test_the_majority_decides_with_its_share_as_confidence() -> None:
    def vote(*choices: int | None) -> tuple[int | None, float]:
        decided = majority([verdict("k", chosen, annotator=str(n)) for n, chosen in enumerate(choices)])
        return decided.chosen, decided.confidence

    assert vote(1) == (1, 0.8)  # one voice keeps its own confidence
    assert vote(0, 0) == (0, 1.0)
    assert vote(0, 1, 0) == (0, 2 / 3)
    assert vote(0, 1) == (None, 0.5)
    assert vote(0, 1, None, 0)[0] is None
    assert vote(None, None, 1) == (None, 2 / 3)


@pytest.mark.parametrize("kind", ["text", "messages", "mixed"])
def test_pairs_can_be_trained_on(tmp_path: Path, kind: str) -> None:
    prompts: list[Any] = ["w7", "w8", "w9"]
    if kind != "text":
        prompts[1:] = [(TURN,), ({"role": "system", "content": "w6"}, TURN)]
    if kind == "messages":
        prompts[0] = (TURN, {"role": "assistant", "content": "w4"}, TURN)
    items = [Candidates(prompt, ("w3 w4", "w5"), f"c{n}", None, f"f:{n}") for n, prompt in enumerate(prompts)]
    items.append(Candidates("w10", ("w3", "w4")))
    items.append(Candidates("w11", ("w3", "w4")))
    verdicts = [verdict(item, n % 2, confidence=0.5 + n / 8) for n, item in enumerate(items[:3])]
    verdicts += [verdict(items[3], None), verdict("a key of other answers")]
    output = tmp_path / "pairs.jsonl"
    summary = finish(output, items, {(item.key, item.annotator): item for item in verdicts})
    assert (summary.candidates, summary.pairs, summary.ties, summary.unlabelled) == (5, 3, 1, 1)
    assert summary.categories == {"c0": 1, "c1": 1, "c2": 1}
    assert "3 pairs, 1 ties, 1 without a verdict of 5" in str(summary) and "c0 1, c1 1, c2 1" in str(summary)
    dataset = load_preference_dataset(str(output), tokenizer=tiny_tokenizer())
    assert dataset.report.dataset_format == ("plaintext" if kind == "text" else "messages")
    assert [(pair.category, pair.confidence) for pair in dataset] == [("c0", 0.5), ("c1", 0.625), ("c2", 0.75)]
    assert [len(pair.chosen_ids) > len(pair.rejected_ids) for pair in dataset] == [True, False, True]
    label = json.loads(output.read_text().splitlines()[1])["label"]
    assert (label["method"], label["version"], label["chosen"], label["key"]) == ("rules", "v1", 1, items[1].key)
    assert (label["scores"], label["origin"], label["time"][:4]) == ([1.0, 0.5], "f:1", "2026")


def test_an_output_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    item = Candidates("p", ("a", "b"))
    (tmp_path / "pairs.jsonl").mkdir()
    with pytest.raises(StorageError, match="All verdicts are in"):
        finish(tmp_path / "pairs.jsonl", [item], {(item.key, None): verdict(item)})
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


def test_a_record_is_of_one_method(tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    open_record(output, "rules", "source").add(verdict("k"))
    assert record_path(output) == tmp_path / "pairs.labels.jsonl"
    with pytest.raises(UsageError, match="holds verdicts by rules"):
        open_record(output, "human", "source")
    with pytest.raises(UsageError, match=r"must end with .jsonl"):
        open_record(tmp_path / "pairs.json", "rules", "source")


def test_real_pairs_become_blind_candidates(shared_data: Path) -> None:
    candidates = load_candidates(str(shared_data / "belle_pairs_hh.jsonl"), "skip")
    assert len(candidates) > 400 and all(item.category for item in candidates)
