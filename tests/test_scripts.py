"""The shell scripts: from any folder, with the given environment, and signals arrive."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["run_dpo_training.sh", "rlhf/run_dpo_training.sh", "run_tests.sh", "scripts/ensure_venv.sh", ".ci/run"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The scripts alone, with requirements that need no download and a command that says what it was given."""
    for script in SCRIPTS:
        (tmp_path / script).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / script, tmp_path / script)
    (tmp_path / "requirements.txt").write_text("")
    for program in ("qlora_dpo", "eval"):
        (tmp_path / program).mkdir()
        (tmp_path / program / "__init__.py").write_text("")
        (tmp_path / program / "__main__.py").write_text(
            "import os, signal, sys, time\n"
            "print(sys.argv[1:], sys.prefix, flush=True)\n"
            "if 'wait' in sys.argv:\n"
            "    signal.signal(signal.SIGTERM, lambda *_: (print('got it', flush=True), os._exit(75)))\n"
            "    time.sleep(30)\n"
        )
    return tmp_path


def run(script: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(script), *arguments], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_and_strict(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert "set -euo pipefail" in (ROOT / script).read_text()


@pytest.mark.slow
def test_first_run_makes_a_venv_and_says_so_and_the_second_is_quiet(clone: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first = run(clone / "rlhf/run_dpo_training.sh", "--beta", "0.2 3", cwd=elsewhere, QLORA_DPO_VENV="")
    assert first.returncode == 0, first.stderr
    assert f"['train', '--beta', '0.2 3'] {clone / '.venv'}" in first.stdout
    assert "Making the virtual environment" in first.stderr and "Installing requirements.txt" in first.stderr
    second = run(clone / "run_dpo_training.sh", cwd=elsewhere, QLORA_DPO_VENV="")
    assert (second.stdout.split("]")[0], second.stderr) == ("['demo'", "")
    (clone / "requirements.txt").write_text("# changed\n")
    assert "Installing" in run(clone / "run_dpo_training.sh", cwd=elsewhere, QLORA_DPO_VENV="").stderr


def test_given_environment_is_used(clone: Path) -> None:
    venv = clone / "given"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    result = run(clone / "run_dpo_training.sh", cwd=clone, QLORA_DPO_VENV=str(venv))
    assert result.returncode == 0 and not (clone / ".venv").exists(), result.stderr


def test_sigterm_reaches_python_through_the_script(clone: Path) -> None:
    venv = clone / "given"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    process = subprocess.Popen(
        [clone / "rlhf/run_dpo_training.sh", "wait"],
        cwd=clone,
        env=os.environ | {"QLORA_DPO_VENV": str(venv)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (75, "got it\n")


def test_missing_python_is_one_sentence(clone: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    result = run(clone / "run_dpo_training.sh", cwd=clone, PATH=str(tools), QLORA_DPO_VENV="")
    assert result.returncode == 1 and "Python 3.11 or newer is needed" in result.stderr
