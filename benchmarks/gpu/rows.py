"""What a measurement gives: rows of tables, written to a file the moment they are there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured yet"
NEEDS_CUDA = "needs CUDA"
NOT_INSTALLED = "not installed"
STOPPED = "stopped after"
OUT_OF_MEMORY = "out of memory"
HARMLESS = (NEEDS_CUDA, NOT_INSTALLED, STOPPED, OUT_OF_MEMORY)


@dataclass(frozen=True)
class Row:
    """A row of a table: what was measured, or in `note` why nothing was."""

    table: str
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @property
    def is_settled(self) -> bool:
        """Whether measuring again would tell nothing new."""
        return bool(self.values) or self.note.startswith((OUT_OF_MEMORY, NOT_INSTALLED))

    @property
    def is_bad(self) -> bool:
        """Whether a promise was not kept, or measuring broke down."""
        is_broken = bool(self.note) and not self.note.startswith(HARMLESS)
        return is_broken or self.values.get("passed") is False or self.values.get("fits") is False


class RowFile:
    """Rows as lines of a file, each flushed: a process that is killed keeps what it measured."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def add(self, row: Row) -> None:
        """Append a row."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(row)) + "\n")

    def rows(self) -> list[Row]:
        """All whole rows; a last line that a kill cut is left out."""
        if not self.file.is_file():
            return []
        lines = self.file.read_text(encoding="utf-8").split("\n")[:-1]
        return [Row(**json.loads(line)) for line in lines]


def merged(earlier: Iterable[Row], later: Iterable[Row]) -> list[Row]:
    """All rows; of two with the same name the later one, but never a note in place of a measurement."""
    found: dict[tuple[str, str], Row] = {}
    for row in [*earlier, *later]:
        known = found.get((row.table, row.name))
        if known is None or row.values or not known.values:
            found[row.table, row.name] = row
    return list(found.values())
