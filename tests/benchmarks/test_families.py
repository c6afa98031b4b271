"""The table of families: what a cell says, and that docs/models.md is what the script writes of its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import families
from benchmarks.families import ROOT, Stage, answer, table
from benchmarks.processes import RESULTS


def results() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "families.json").read_text(encoding="utf-8"))
    return found


def test_page_is_what_the_script_writes() -> None:
    assert table(results()) == (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_results_are_of_every_family_and_command() -> None:
    rows = results()["rows"]
    assert list(rows) == list(families.FAMILIES) and len(rows) >= 20
    assert all(list(cells) == list(families.STAGES) for cells in rows.values())


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (0, "all well\n", ("yes", "")),
        (65, "reading\nerror: base is a t5. Name another.\n", ("refused", "base is a t5. Name another.")),
        (1, "Traceback (most recent call last):\n  ...\nKeyError: 'x'\n", ("crashed", "KeyError: 'x'")),
        (
            1,
            "Traceback (most recent call last):\n  ...\nRuntimeError: error: no\n",
            ("crashed", "RuntimeError: error: no"),
        ),
        (1, "", ("crashed", "exit code 1, not a word")),
    ],
)
def test_answer_of_a_command(code: int, text: str, expected: tuple[str, str]) -> None:
    assert answer(code, text) == expected


@pytest.mark.slow
def test_a_family_goes_through_its_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {
        "plan": families.STAGES["plan"],
        "train": families.STAGES["train"],
        "silent": Stage("env", leaves="nothing.json"),
        "refused": Stage("score --adapter elsewhere --dataset pairs.jsonl --output scores.jsonl"),
        "after": Stage("env", needs="refused"),
    }
    monkeypatch.setattr(families, "STAGES", stages)
    file, page = tmp_path / "families.json", tmp_path / "models.md"
    words = ["families.py", "--families", "llama", "--output", str(file), "--table", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    families.main()
    found = json.loads(file.read_text())
    cells = found["rows"]["llama"]
    assert [cell["outcome"] for cell in cells.values()] == ["yes", "yes", "crashed", "refused", "not asked"]
    assert "no nothing.json" in cells["silent"]["said"] and "elsewhere" in cells["refused"]["said"]
    assert page.read_text() == table(found)
    assert "| llama | yes | yes | **crashes** [1] | no [2] | – |" in page.read_text()
