"""The measurement of `eval compare` runs, in its small form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_small_form_compares_in_both_ways(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "benchmarks/compare_speed.py", "--tiny"],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "| batches of 4 |" in result.stdout and "| one by one |" in result.stdout
