"""One process at a time trains in a folder; a lock ends with its process, however that ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forks
import pytest

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.training.folder.run_folder import RunFolder, held_run_folder
from qlora_dpo.training.folder.run_lock import LOCK, locked

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from qlora_dpo.training.folder.run_lock import locked
{before}
with locked(Path(sys.argv[1])):
    {within}
    print("held", flush=True)
    time.sleep(120)
"""


@contextmanager
def other_process(folder: Path, before: str = "", within: str = "pass") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    code = HOLDER.format(before=before, within=within)
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def holder(folder: Path) -> dict[str, Any]:
    return json.loads((folder / LOCK).read_text() or "{}")


def test_second_process_is_refused_with_the_first_ones_id_and_host(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        with pytest.raises(StorageError) as refused, locked(tmp_path):
            raise AssertionError("two processes hold the folder")
        assert f"{tmp_path} is in use: process {process.pid} on {socket.gethostname()} (since " in str(refused.value)
        assert holder(tmp_path)["pid"] == process.pid  # the second one has not written over it


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_lock_of_a_process_that_was_killed_is_taken_over(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_process(tmp_path) as process:
        process.send_signal(number)
        process.wait()
        assert holder(tmp_path)["pid"] == process.pid
        with locked(tmp_path):
            assert holder(tmp_path)["pid"] == os.getpid()
    assert f"process {process.pid} on {socket.gethostname()}" in capsys.readouterr().err
    assert holder(tmp_path) == {}


def test_lock_whose_process_id_belongs_to_another_program_now_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = {"pid": os.getppid(), "host": socket.gethostname(), "since": "yesterday"}
    (tmp_path / LOCK).write_text(json.dumps(left))
    with locked(tmp_path):
        pass
    assert f"process {os.getppid()} on {socket.gethostname()} (since yesterday) ended" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "\0\0", '{"pid": 1, "ho'])
def test_damaged_lock_file_is_no_obstacle(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with locked(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()


def test_lock_does_not_live_on_in_a_forked_child(tmp_path: Path) -> None:
    """As a worker that outlives a killed run would."""
    with other_process(tmp_path, before="import os", within="child = os.fork() or (time.sleep(20), os._exit(0))"):
        time.sleep(1)  # the child has been forked by then, and lives for 20 seconds; only the parent is killed
    with locked(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()


def test_lock_is_given_back_at_the_end_and_after_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with locked(tmp_path):
            pass
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError
    assert holder(tmp_path) == {} and capsys.readouterr().err == ""


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_locks_is_a_warning(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_file: int, _operation: int) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert holder(tmp_path)["pid"] == os.getpid()
    assert f"warning: {tmp_path} cannot be locked ({os.strerror(reason)})" in capsys.readouterr().err


# Run folders


def test_fresh_does_not_delete_a_run_that_is_under_way(tmp_path: Path) -> None:
    with held_run_folder(tmp_path / "run", {"beta": 1}, fresh=False) as run:
        run.begin()
    with other_process(tmp_path / "run"):
        with pytest.raises(StorageError, match="is in use"), held_run_folder(tmp_path / "run", {}, fresh=True):
            raise AssertionError
        assert RunFolder(tmp_path / "run").status()["status"] == "training"


def test_fresh_keeps_its_own_lock_while_it_deletes(tmp_path: Path) -> None:
    for name in ("checkpoint-4", "pairs"):
        (tmp_path / name).mkdir()
    with held_run_folder(tmp_path / "run", {"beta": 1}, fresh=False) as run:
        run.begin()
        (run.path / "checkpoint-4").mkdir()
        (run.path / "metrics.jsonl").write_text("")
    with held_run_folder(tmp_path / "run", {"beta": 2}, fresh=True) as run:
        assert {path.name for path in run.path.iterdir()} == {LOCK, "config.yaml", "run.json"}
        with pytest.raises(StorageError, match="is in use"), locked(run.path):
            raise AssertionError


def test_folder_of_something_else_gets_no_lock_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match="holds files but no run"), held_run_folder(tmp_path, {}, fresh=True):
        raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_fresh_that_is_cut_short_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_run_folder(tmp_path, {"beta": 1}, fresh=False) as run:
        run.begin()
        (run.path / "checkpoint-4").mkdir()
    original = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if target.name == "run.json":
            raise OSError(errno.EIO, "Input/output error")
        return original(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(StorageError, match="Input/output error"), held_run_folder(tmp_path, {"beta": 2}, fresh=True):
        raise AssertionError
    assert not (tmp_path / "checkpoint-4").exists()  # no option that is corrected now could meet an old checkpoint
    with pytest.raises(UsageError, match="beta: was 1, now 2"), held_run_folder(tmp_path, {"beta": 2}, fresh=False):
        raise AssertionError
    monkeypatch.undo()
    with held_run_folder(tmp_path, {"beta": 2}, fresh=True) as run:
        assert run.status()["status"] == "new"


# The command


def arguments(model: Path, pairs: Path, out: Path) -> list[str]:
    options = {
        "--model_name_or_path": model, "--dataset": pairs, "--output_dir": out, "--max_steps": 5000,
        "--save_steps": 5000, "--gradient_accumulation_steps": 2, "--dtype": "float32", "--lora_r": 4,
    }  # fmt: skip
    return [str(part) for pair in options.items() for part in pair]


@pytest.mark.slow
def test_two_train_commands_on_one_folder(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    words = ["train", *arguments(model_folder, pairs_file, out)]
    first = forks.Command(words, log)
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-0").is_dir() and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.05)
        second = forks.run(words, tmp_path)
        assert second.returncode == 74, second.stderr
        assert f"{out} is in use: process {first.pid} on {socket.gethostname()}" in second.stderr
        assert "Traceback" not in second.stderr
        readers = ["merge", "--adapter", str(out), "--output", str(tmp_path / "merged"), "--allow_unfinished"]
        read = forks.run(readers, tmp_path)
        assert read.returncode == 0, read.stderr  # a reader may read
        assert first.poll() is None, log.read_text()
    finally:
        first.kill()
        first.wait()
