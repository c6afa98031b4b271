"""A file of lines that only grows, which several processes and threads may append to, and that survives a kill."""

from __future__ import annotations

import fcntl
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlora_dpo.errors import DataError, StorageError
from qlora_dpo.files.guard import open_own

_BLOCK = 4096  # bytes


class RecordFile:
    """Appends whole lines under the kernel's lock, and yields each line once.

    `check` is given the first line with its `file:line`, and raises DataError where it is none of this kind of file;
    `beginning` is what every first line begins with. Nothing is cut off, and no file is made, before they were asked.

    Raises:
        DataError: the file is something else.
        StorageError: the file cannot be opened, read or written.
    """

    def __init__(self, path: Path, beginning: bytes, check: Callable[[str, bytes], object]) -> None:
        self._path, self._beginning, self._check = path, beginning, check
        self._threads = threading.Lock()  # the kernel's lock is one for all threads of a process
        self._is_own = False
        self._read_to = 0
        self._lines = 0
        with self._opened():
            pass

    def append(self, text: str) -> None:
        """Write lines; when this returns they are on the disk."""
        with self._opened() as file:
            content = text.encode()
            while content:
                content = content[file.write(content) :]
            os.fsync(file.fileno())

    def new(self) -> list[tuple[str, bytes]]:
        """The lines that were not yielded before, each with `file:line`."""
        with self._opened() as file:
            file.seek(self._read_to)
            content = file.read()
            self._read_to += len(content)
            lines = _numbered(self._path, content, self._lines + 1)
            self._lines += len(lines)
            return lines

    @contextmanager
    def _opened(self) -> Iterator[io.FileIO]:
        """The file for this thread of this process alone; what a kill left of a last line is cut off."""
        with self._threads:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with io.FileIO(self._path, "a+", opener=lambda _, flags: open_own(self._path, flags)) as file:
                    with suppress(OSError):  # some network file systems have no locks
                        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the closing of the file
                    self._refuse_foreign(file)
                    file.truncate(_end_of_lines(file))
                    yield file
            except OSError as error:
                raise StorageError(
                    f"{self._path} cannot be written: {error.strerror or error}. Make room there, or name another "
                    "--output, and run the same command again."
                ) from error

    def _refuse_foreign(self, file: io.FileIO) -> None:
        """Look at the first line before anything is cut off; once, for a file only grows."""
        if self._is_own:
            return
        first = _first_line(file)
        if first.endswith(b"\n") or _is_json(first):
            self._check(f"{self._path}:1", first)
            self._is_own = True
        elif not self._beginning.startswith(first[: len(self._beginning)]):  # else a kill tore it
            raise DataError(f"{self._path}: not a line of this command, so this file is something else. Move it away.")


def _first_line(file: io.FileIO) -> bytes:
    """With its newline, where it has one."""
    file.seek(0)
    line = b""
    while b"\n" not in line and (block := file.read(_BLOCK)):
        line += block
    return line[: line.find(b"\n") + 1] or line


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def read_lines(path: Path) -> list[tuple[str, bytes]]:
    """All whole lines of a record that is only read, each with `file:line`.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}; check the path.") from error
    return _numbered(path, content[: content.rfind(b"\n") + 1], 1)


def _numbered(path: Path, content: bytes, first: int) -> list[tuple[str, bytes]]:
    return [(f"{path}:{number}", line) for number, line in enumerate(content.splitlines(), first)]


def _end_of_lines(file: io.FileIO) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
