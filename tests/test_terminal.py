"""A log that can no longer be written does not change how a command ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def exit_code(*arguments: str | Path) -> int:
    with FULL.open("w") as log:
        command = [sys.executable, "-m", "qlora_dpo", *map(str, arguments)]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=log, check=False).returncode


def test_error_that_nobody_can_read_keeps_its_exit_code() -> None:
    assert exit_code("train", "--bta", "1") == 2


@pytest.mark.slow
def test_run_whose_log_is_on_a_full_disk_comes_to_its_end(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", run, "--max_steps", "2"]
    assert exit_code("train", *options) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
