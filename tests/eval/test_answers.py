"""The files of a comparison: all that was written is there again, a kill tears nothing but its own line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparisons import row, sample

from eval.answers import (
    AnswerFile,
    Verdict,
    VerdictFile,
    read_answers,
    read_summary,
    read_verdicts,
    write_summary,
)
from qlora_dpo.errors import DataError, StorageError, UsageError

SETTINGS = {"seed": 1, "temperature": 0.0, "adapter": "runs/a", "versions": {"torch": "2.13"}}
ROWS = [
    row(0, "w3\nw4", "中文 😀", fact="w4", sample=sample(3, -1.5, -2.5)),
    row(1, prompt=({"role": "user", "content": "w1"},), category="math", reference_answer="w9"),
]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    AnswerFile(tmp_path, SETTINGS).add(*ROWS)
    assert read_answers(tmp_path) == (SETTINGS, ROWS)
    assert list(AnswerFile(tmp_path, SETTINGS).rows.values()) == ROWS
    assert "settings" in json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize("kept", [1, 10, 40, 60, 300, 900])
def test_a_torn_line_is_cut_off_and_written_again(tmp_path: Path, kept: int) -> None:
    AnswerFile(tmp_path, SETTINGS).add(*ROWS)
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    file = AnswerFile(tmp_path, SETTINGS)
    left = [one for one in ROWS if one.id not in file.rows]
    assert left
    file.add(*left)
    assert path.read_bytes() == whole


def test_rows_are_put_in_order(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path, SETTINGS)
    file.add(ROWS[1])
    file.add(ROWS[0])
    assert file.finish([one.id for one in ROWS]) == ROWS
    assert read_answers(tmp_path) == (SETTINGS, ROWS)


def test_other_settings_are_refused_and_other_versions_are_not(tmp_path: Path) -> None:
    AnswerFile(tmp_path, SETTINGS).add(*ROWS)
    with pytest.raises(UsageError, match=r"temperature 0\.0, now 1\.0"):
        AnswerFile(tmp_path, SETTINGS | {"temperature": 1.0})
    with pytest.raises(UsageError, match="kl_samples None, now 3"):
        AnswerFile(tmp_path, SETTINGS | {"kl_samples": 3})
    assert len(AnswerFile(tmp_path, SETTINGS | {"adapter": "moved", "versions": {"torch": "3"}}).rows) == 2


@pytest.mark.parametrize("content", ["a poem\n", "a poem", '{"prompt": "w3"}\n', "[1]\n", "\n"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="something else"):
        AnswerFile(tmp_path, SETTINGS)
    assert path.read_text() == content


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    AnswerFile(tmp_path, SETTINGS).add(*ROWS)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"id": "x", "prompt": "w3"}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:4: not a row"):
        read_answers(tmp_path)


def test_the_last_verdict_of_a_method_and_an_annotator_counts(tmp_path: Path) -> None:
    first = Verdict("a", "rule:chrf", "tie", (0.5, 0.5), {"x": 1}, "1")
    again = Verdict("a", "rule:chrf", "after", (0.5, 0.6), {}, "2")
    votes = [Verdict("a", "human", "before", annotator=name) for name in ("ann", "bob")]
    VerdictFile(tmp_path).add(first, *votes)
    record = VerdictFile(tmp_path)
    assert record.verdicts() == [first, *votes]
    VerdictFile(tmp_path).add(again)
    assert record.verdicts() == [again, *votes] == read_verdicts(tmp_path)


def test_verdicts_of_other_programs_need_only_three_names(tmp_path: Path) -> None:
    (tmp_path / "verdicts.jsonl").write_text('{"id": "a", "method": "human", "winner": "after", "more": 1}\n')
    assert read_verdicts(tmp_path) == [Verdict("a", "human", "after")]
    (tmp_path / "verdicts.jsonl").write_text('{"id": "a", "method": "human", "winner": "left"}\n')
    with pytest.raises(DataError, match=r"verdicts\.jsonl:1: not a verdict"):
        read_verdicts(tmp_path)
    assert read_verdicts(tmp_path / "nothing") == []


def test_a_summary_that_is_not_there_says_why(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not there"):
        read_summary(tmp_path)
    AnswerFile(tmp_path, SETTINGS)
    with pytest.raises(StorageError, match="has not finished"):
        read_summary(tmp_path)
    write_summary(tmp_path, {"prompts": 2})
    assert read_summary(tmp_path) == {"prompts": 2}
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        read_summary(tmp_path)
