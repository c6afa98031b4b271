"""A folder appears under its final name whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from qlora_dpo.errors import StorageError
from qlora_dpo.release.staging import require_space, staged

ROOT = Path(__file__).resolve().parents[2]
HANGING = """
import sys, time
from pathlib import Path
from qlora_dpo.release.staging import staged
with staged(Path(sys.argv[1])) as folder:
    (folder / "half.json").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@contextmanager
def hanging(output: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process in the middle of writing."""
    command = [sys.executable, "-c", HANGING, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            yield process
        finally:
            process.kill()


def test_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with staged(output) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
        assert not output.exists()
    assert (output / "inner" / "file").read_text() == "text" and [*output.parent.iterdir()] == [output]


def test_empty_folder_is_taken_and_a_used_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with staged(tmp_path / "empty") as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "empty" / "file").read_text() == "new"
    (tmp_path / "used").mkdir()
    with pytest.raises(StorageError, match="used cannot be written: Directory not empty"), staged(tmp_path / "used"):
        (tmp_path / "used" / "file").write_text("came meanwhile")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["empty", "file", "used", "file"]


@pytest.mark.parametrize("stop", [ValueError("wrong"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_nothing_is_left_of_what_failed(stop: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(stop)), staged(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise stop
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_command_is_cleared_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with hanging(output) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not output.exists() and (tmp_path / ".out.staging" / "half.json").is_file()
    with staged(output) as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").write_text("whole")
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["out", "file"]


def test_second_command_does_not_touch_what_the_first_writes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with hanging(output), pytest.raises(StorageError, match="another command is writing"), staged(output):
        pass
    assert (tmp_path / ".out.staging" / "half.json").read_text() == "half"


def test_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match=r"out cannot be written: File too large\..*Make room"):
            with staged(tmp_path / "out") as folder:
                save_file({"weight": torch.zeros(10_000)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_other_refusals_of_the_disk_are_storage_errors(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"out cannot be written: Input/output error"), staged(tmp_path / "out"):
        raise OSError(errno.EIO, "Input/output error")
    (tmp_path / "file").write_text("text")
    with (
        pytest.raises(StorageError, match=r"file/out cannot be written: Not a directory"),
        staged(tmp_path / "file/out"),
    ):
        pass


def test_too_little_room_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 2**29))
    require_space(tmp_path / "not" / "yet", 3 * 2**29, "merging")
    with pytest.raises(StorageError, match=f"^merging takes 2.0 GiB, and {tmp_path} has 1.5 GiB free"):
        require_space(tmp_path / "not" / "yet", 2 * 2**30, "merging")


def test_files_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (done.append("rename"), rename(path, target))[1])
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("text")
    assert done == ["file", ".out.staging", "rename", tmp_path.name]
