"""The benchmark of the reference store takes every step both ways and writes what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "reference_store.py"


@pytest.mark.slow
def test_tiny_run_writes_its_table(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--output", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "reference_store.json").read_text())
    assert [len(seconds) for seconds in results["seconds"].values()] == [3, 3, 3]
    assert all(
        0 < looked_up < stored
        for looked_up, stored in zip(results["seconds"]["looked_up"], results["seconds"]["stored"], strict=True)
    )
    assert "x faster" in (tmp_path / "reference_store.md").read_text()


def test_measured_results_are_not_replaced_by_tiny_ones() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--tiny"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs --output" in done.stderr
