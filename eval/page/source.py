"""What the page is about: a run, the comparison of its answers, or a comparison alone; read again when files change."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers import ANSWERS, FOLDER, SUMMARY, VERDICTS, Row, Verdict, read_answers, read_verdicts
from qlora_dpo.errors import StorageError
from qlora_dpo.training.folder.run_folder import CONFIG

Stamp = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class Recorded:
    """Rows of a comparison and what was said about them."""

    rows: Sequence[Row] = ()
    verdicts: Sequence[Verdict] = ()


class Source:
    """Where the page finds what it shows; any of it may be missing, or go."""

    def __init__(self, *, run: Path | None, comparison: Path | None, adapter: Path | None = None) -> None:
        self.run, self.comparison, self.adapter = run, comparison, adapter
        self._recorded = Cached(self._read)

    @property
    def name(self) -> str:
        """What a person calls it."""
        path = self.run or self.adapter or self.comparison
        return "" if path is None else path.resolve().name

    @property
    def votes_folder(self) -> Path:
        """Where votes are kept."""
        has_answers = self.comparison is not None and (self.comparison / ANSWERS).is_file()
        folder = self.comparison if has_answers else self.run or self.adapter or self.comparison
        assert folder is not None
        return folder

    def recorded(self) -> Recorded:
        """The comparison as it is now; empty where there is none.

        Raises:
            DataError, StorageError: it cannot be read.
        """
        return self._recorded(stamp(self.comparison, (ANSWERS, VERDICTS)))

    def _read(self) -> Recorded:
        if self.comparison is None or not (self.comparison / ANSWERS).is_file():
            return Recorded()
        return Recorded(read_answers(self.comparison)[1], read_verdicts(self.comparison))


def recorded_source(path: Path) -> Source:
    """The source that --recorded names: the folder of a comparison, its answers.jsonl, or a run.

    Raises:
        StorageError: it is none of these.
    """
    if not path.exists():
        raise StorageError(f"--recorded {path}: is not there. Name the folder of a comparison, or a run.")
    folder = path.parent if path.is_file() else path
    if path.is_file() and path.name != ANSWERS:
        raise StorageError(f"--recorded {path}: name {ANSWERS} of a comparison, its folder, or a run.")
    if (folder / CONFIG).is_file():
        return Source(run=folder, comparison=folder / FOLDER)
    if (folder / ANSWERS).is_file() or (folder / SUMMARY).is_file():
        read_answers(folder)
        has_run = (folder.absolute().parent / CONFIG).is_file()
        return Source(run=folder.absolute().parent if has_run else None, comparison=folder)
    raise StorageError(
        f"--recorded {path}: holds neither a comparison ({ANSWERS}) nor a run ({CONFIG}). Make a comparison with "
        "`python -m eval compare`."
    )


class Cached:
    """What was read last, until its stamp changes."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read, self._lock = read, threading.Lock()
        self._stamp: Stamp | None = None
        self._found: Any = None

    def __call__(self, now: Stamp) -> Any:
        """What is there now."""
        with self._lock:
            if now != self._stamp:
                self._found = self._read()
                self._stamp = now
            return self._found


def stamp(folder: Path | None, names: Sequence[str]) -> Stamp:
    """Size and time of these files."""
    found: list[tuple[int, int] | None] = []
    for name in names if folder is not None else ():
        assert folder is not None
        try:
            status = (folder / name).stat()
            found.append((status.st_size, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return tuple(found)


def quoted(path: Path | str | None, otherwise: str) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path)) if path is not None else otherwise
