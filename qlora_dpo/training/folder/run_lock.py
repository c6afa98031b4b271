"""One process at a time trains in a run folder; readers (merge, the page) need no lock.

The lock is the kernel's, on a file that stays open for the whole run, so it ends with the process, however that ends.
What the file says (process, host, since when) is for the message to the one who comes second.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from qlora_dpo.errors import StorageError
from qlora_dpo.files.guard import open_own

LOCK = ".lock"
_BEGINNING = b'{"pid": '


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within this block no other process trains in the folder.

    Raises:
        OSError: the lock file cannot be made.
        StorageError: another process has the lock, or the lock file is something else.
    """
    held = [_opened(folder / LOCK)]
    # A forked child shares the open file and the lock with it, which must end with this process all the same.
    os.register_at_fork(after_in_child=lambda: _close(held))
    try:
        _lock(held[0], folder)
        _refuse_foreign(held[0], folder / LOCK)
        left = _read(held[0])
        if left:
            print(f"{_words(left)} ended without a word; its lock on {folder} is taken over.", file=sys.stderr)
        _write(held[0], {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%F %T}"})
        try:
            yield
        finally:
            if held:
                _write(held[0], {})
    finally:
        _close(held)


def _opened(path: Path) -> int:
    try:
        return open_own(path, os.O_RDWR)
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise StorageError(
                f"{path} is a link, a folder or a device, and a run's lock is a file. Remove it."
            ) from error
        raise


def _refuse_foreign(file: int, path: Path) -> None:
    """Refuse a file that no run wrote; what a kill or a power cut left of a run's own is no obstacle."""
    content = os.pread(file, 4096, 0)
    if content.strip(b"\0 \n") and not content.startswith(_BEGINNING[: len(content)]):
        raise StorageError(f"{path} is not the lock of a run of this tool. Move it away, or name another --output_dir.")


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(
            f"{folder} is in use: {_words(_read(file))} trains there. Wait for it, stop it, or name another "
            "--output_dir."
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(
            f"warning: {folder} cannot be locked ({error.strerror or error}); see to it that no other process trains "
            "there.",
            file=sys.stderr,
        )


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('since')})"


def _read(file: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(file, 4096, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(file: int, holder: dict[str, Any]) -> None:
    with suppress(OSError):  # on a full disk only the message gets poorer
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode() if holder else b"", 0)


def _close(held: list[int]) -> None:
    if held:
        os.close(held.pop())
