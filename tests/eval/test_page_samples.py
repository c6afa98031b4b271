"""Recorded answers: filter, search, order, and files without formulas."""

from __future__ import annotations

import csv
import io
import json

import pytest
from comparisons import answer, row

from eval.answers import Verdict
from eval.page.samples import Filter, as_csv, as_jsonl
from eval.page.source import Recorded

ROWS = (
    row(0, "short", answer("a long one", tokens=9, reward=0.1), category="math", prompt="What is 1+1?"),
    row(1, "Ärger", answer("calm", tokens=2, reward=-0.5), category="talk"),
    row(2, "x", answer("y", tokens=3, reward=0.9), category="talk"),
)
VERDICTS = (Verdict(ROWS[0].id, "rule:chrf", "after"), Verdict(ROWS[1].id, "human", "before"))
RECORDED = Recorded(ROWS, VERDICTS)


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        (Filter(), [0, 1, 2]),
        (Filter(search="1+1"), [0]),
        (Filter(search="äRGER"), [1]),
        (Filter(category="talk"), [1, 2]),
        (Filter(winner="before"), [1]),
        (Filter(winner="tie"), []),
        (Filter(category="talk", search="calm", winner="before"), [1]),
        (Filter(order="order_longer"), [0, 2, 1]),
        (Filter(order="order_reward"), [2, 0, 1]),
        (Filter(order="order_fell"), [1, 0, 2]),
        (Filter(order="__class__"), [0, 1, 2]),
    ],
)
def test_filters(wanted: Filter, places: list[int]) -> None:
    assert wanted(RECORDED) == [ROWS[place] for place in places]


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", '=HYPERLINK("http://x","y")'])
def test_no_cell_of_a_csv_is_a_formula(formula: str) -> None:
    found = row(0, formula, formula, category=formula, reference_answer=formula, prompt=formula)
    _, line = csv.reader(io.StringIO(as_csv(Recorded((found,)), (found,)), newline=""))
    assert [cell for cell in line if cell.startswith("'")] == [f"'{formula}"] * 5
    assert not any(cell[:1] in "=+-@\t\r" for cell in line[:7] if cell)


def test_files_hold_the_texts_whatever_they_are() -> None:
    odd = row(0, 'a "b", c\nd \ud83d \x00', "你好 🎉", category=None)
    recorded = Recorded((odd, *ROWS[1:]), VERDICTS)
    lines = [json.loads(line) for line in as_jsonl(recorded, recorded.rows).splitlines()]
    assert lines[0]["before"] == odd.before.text
    assert lines[1]["verdicts"] == {"human": "before"}
    table = list(csv.DictReader(io.StringIO(as_csv(recorded, recorded.rows), newline="")))
    assert table[0]["after"] == "你好 🎉" and 'a "b", c\nd' in table[0]["before"]
    assert table[1]["verdicts"] == "human: before"
