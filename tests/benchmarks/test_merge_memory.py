"""The benchmark of a merge's memory: a tiny run writes its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import merge_memory


@pytest.mark.slow
def test_tiny_run_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_memory, "MERGES", merge_memory.MERGES[:2])
    monkeypatch.setattr(sys, "argv", ["merge_memory.py", "--tiny", "--output", str(tmp_path)])
    merge_memory.main()
    results = json.loads((tmp_path / "merge_memory.json").read_text())
    assert results["files"] > 2 and len(results["rows"]) == 2
    for row in results["rows"]:
        assert row["files"] > 2 and row["holds"] and row["libraries_gib"] < row["peak_gib"] < row["limit_gib"]
        assert row["written_gib"] == pytest.approx(results["base_gib"], rel=0.01)
    assert (tmp_path / "merge_memory.md").read_text().count("| yes |") == 2
