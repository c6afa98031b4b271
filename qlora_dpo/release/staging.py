"""A folder appears under its final name whole or not at all: it is written beside it, synced, and renamed last."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_dpo.errors import StorageError
from qlora_dpo.training.folder.checkpoints import disk_errors, sync

# What a killed command may have left: a model's files, whole or not, and folders of candidates and offloaded weights.
_LEFT = re.compile(
    r"[\w.-]+\.(safetensors|json|jinja|model|txt|gguf|md|tmp)|Modelfile|\.tmp\w+|\.offload-\w+|(train|original), \w+"
    r"|additional_chat_templates"
)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A new hidden folder beside `output`, which takes that name when the block ends well, and else is deleted.

    What a killed command left there is cleared first.

    Raises:
        StorageError: the disk is full or refuses, or another command writes there now.
    """
    output = Path(os.path.abspath(output))
    staging = output.with_name(f".{output.name}.staging")
    with _storage_errors(output), disk_errors():
        held = _claimed(staging)
        try:
            yield staging
            sync_folder(staging)
            if output.is_dir():
                output.rmdir()  # it was empty; what has come into it since is not overwritten
            staging.rename(output)
            sync(output.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(held)


def require_space(folder: Path, size: int, doing: str) -> None:
    """Refuse to begin what the disk of `folder`, which need not exist yet, has no room for.

    Raises:
        StorageError: with what is needed and what is free.
    """
    existing = Path(os.path.abspath(folder))
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < size:
        raise StorageError(
            f"{doing} takes {_amount(size)}, and {existing} has {_amount(free)} free. Make room, or name a folder on "
            "another disk."
        )


def sync_folder(folder: Path) -> None:
    """Bring every file below a folder, and the folders themselves, to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def _claimed(staging: Path) -> int:
    """Make the folder anew, for this process alone: the open descriptor holds it until the process ends."""
    staging.mkdir(parents=True, exist_ok=True)
    held = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(held, staging)
        if foreign := [path for path in staging.iterdir() if not _LEFT.fullmatch(path.name)]:
            raise StorageError(
                f"{foreign[0]} is of no unfinished command. Move {staging} away, and repeat the command."
            )
        for leftover in staging.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
    except BaseException:
        os.close(held)
        raise
    return held


def _lock(held: int, staging: Path) -> None:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        is_free = False
    except OSError:  # some network file systems have no locks
        is_free = True
    else:
        is_free = staging.exists() and _same(held, staging)
    if not is_free:
        raise StorageError(f"another command is writing {staging}. Wait for it, stop it, or name another folder.")


def _same(held: int, staging: Path) -> bool:
    """Whether the path still is what was opened: who had the lock may have renamed it meanwhile."""
    return os.path.samestat(os.fstat(held), staging.stat())


@contextmanager
def _storage_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = " Make room and run the same command again." if error.errno in _FULL else ""
        raise StorageError(
            f"{output} cannot be written: {error.strerror or error}. Nothing was left there.{full}"
        ) from error


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
