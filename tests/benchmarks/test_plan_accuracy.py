"""The comparison of plan and peak runs, and tells what it compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "plan_accuracy.py"


@pytest.mark.slow
def test_tiny_cases_are_predicted_and_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--tiny", "--output", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "plan_accuracy.json").read_text())["rows"]
    assert [row["level"] for row in rows] == ["none", "full"]
    assert all(0.3 < row["predicted_gib"] / row["peak_gib"] < 3 for row in rows)
    assert rows[0]["case"] in (tmp_path / "plan_accuracy.md").read_text()


def test_measured_results_are_not_replaced_by_tiny_ones() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--tiny"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs --output" in done.stderr
