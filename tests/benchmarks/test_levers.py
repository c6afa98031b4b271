"""The benchmark of the lean layers: both forms of a lever compute the same, and a tiny run writes its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import levers
from benchmarks.programs import TINY_SHAPE


@pytest.mark.slow
def test_both_forms_of_a_lever_agree() -> None:
    for name, _, own, lean in levers.candidates(TINY_SHAPE, 16):
        for ours, theirs in zip(lean(), own(), strict=True):
            assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm(), name
            assert not torch.equal(ours, torch.zeros_like(ours)), name


@pytest.mark.slow
def test_lean_forms_keep_no_more() -> None:
    for name, _, own, lean in levers.candidates(TINY_SHAPE, 16):
        assert levers.kept_bytes(lean) <= levers.kept_bytes(own), name


@pytest.mark.slow
def test_tiny_run_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["levers.py", "--tiny", "--output", str(tmp_path)])
    levers.main()
    results = json.loads((tmp_path / "levers.json").read_text())
    assert [row["used"] for row in results["rows"]] == ["yes", "yes", "yes", "no"]
    assert (tmp_path / "levers.md").read_text().count("→") == 12
