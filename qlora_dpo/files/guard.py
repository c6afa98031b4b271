"""Where a command may write: never into its own input, never over what this tool did not write.

Every command asks here before it computes anything. A file that is there is replaced only where its content says that
the same command wrote it (`is_own`); where no content can say so, as with rows, it is never replaced.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_dpo.errors import StorageError, UsageError

IsOwn = Callable[[Path], bool]

_HEAD = 4096  # bytes in which a text or a picture says who wrote it


def check_output(
    path: Path, *, inputs: Iterable[str | Path] = (), is_own: IsOwn | None = None, option: str | None = "output",
    hint: str = "",
) -> None:  # fmt: skip
    """Refuse a file to write that is an input, or is there and not this command's own; `option` names it, and is None
    for a file beside the one that an option names.

    Raises:
        UsageError: it is refused; nothing was changed.
        StorageError: it cannot be looked at.
    """
    named = f"--{option} {path}" if option else str(path)
    try:
        refuse_inputs(path, inputs, named)
        if path.is_symlink():
            raise UsageError(f"{named} is a link. Name the file itself.")
        if not path.exists():
            return
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{named} is a folder or a device. Name a file.")
        if not path.stat().st_size or (is_own is not None and is_own(path)):
            return
    except OSError as error:
        raise StorageError(f"{named} cannot be looked at: {error.strerror or error}. Name another file.") from error
    whose = "" if is_own is None else " and was not written by this command"
    advice = "Name another file" if option else "Name another --output"
    raise UsageError(f"{named} exists{whose}. {advice}, or move it away{hint}.")


def refuse_inputs(path: Path, inputs: Iterable[str | Path], named: str) -> None:
    """Refuse a path that is one of these, under whatever name, or lies in one; names of no file here are passed over.

    Raises:
        UsageError: naming the input.
    """
    place = path.resolve()
    for name in inputs:
        source = Path(name).expanduser()
        within = place.parents if source.is_dir() else ()
        if source.exists() and (source.resolve() in (place, *within) or _is_same(path, source)):
            raise UsageError(f"{named} is where {name} is read from. Name a file elsewhere.")


def refuse_used_folder(path: Path, option: str = "output") -> None:
    """Refuse a folder to write that is a file or a link, or holds something.

    Raises:
        UsageError: naming it.
    """
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UsageError(f"--{option} {path} is in use. Name a new or empty folder.")


def json_with(*keys: str) -> IsOwn:
    """A file that holds one JSON object with all these keys."""

    def is_own(path: Path) -> bool:
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= set(keys)

    return is_own


def lines_with(is_row: Callable[[Mapping[str, Any]], object]) -> IsOwn:
    """A file of JSON lines whose first row `is_row`."""

    def is_own(path: Path) -> bool:
        with path.open("rb") as file:
            line = file.readline()
        try:
            row = json.loads(line)
            return isinstance(row, dict) and bool(is_row(row))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return False

    return is_own


def marked(mark: bytes) -> IsOwn:
    """A file that says in its beginning who wrote it."""

    def is_own(path: Path) -> bool:
        with path.open("rb") as file:
            return mark in file.read(_HEAD)

    return is_own


def open_own(path: Path, flags: int) -> int:
    """Open a file of the tool's own, which is made where there is none; a link, a folder or a device is refused.

    Raises:
        OSError: it is one of these, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(22, "it is no regular file", str(path))
    return descriptor


def _is_same(path: Path, other: Path) -> bool:
    """Whether both are one file on the disk, also as hard links."""
    return path.exists() and path.samefile(other)
