"""The prompts to pick: those of the comparison, else those that the run held out, else built-in ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from eval.answers import Row
from eval.page.source import Source
from eval.page.text import plain, showable
from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import QloraDpoError

MOST = 200
_LABEL = 90  # characters

Origin = Literal["pick", "pick_built_in", "pick_recorded", "pick_loading"]


@dataclass(frozen=True)
class Pick:
    """A prompt to pick."""

    prompt: str | Sequence[Message]
    category: str | None = None
    reference_answer: str | None = None
    row: Row | None = None
    """Its recorded answers, where there are some."""

    @property
    def text(self) -> str:
        """What is put into the prompt's box."""
        return showable(plain(self.prompt))

    @property
    def label(self) -> str:
        """One line."""
        line = " ".join(self.text.split())
        line = line if len(line) <= _LABEL else line[:_LABEL] + "…"
        return f"{showable(self.category)} · {line}" if self.category else line


class PromptList:
    """Prompts that may still be being read while the page is already there."""

    def __init__(self, source: Source, read: Callable[[], tuple[Origin, Sequence[Pick]]] | None = None) -> None:
        """`read` finds prompts where the source has no recorded ones; it runs beside the page."""
        self._source = source
        self._origin: Origin = "pick_loading" if read else "pick_recorded"
        self._found: Sequence[Pick] = ()
        if read:
            threading.Thread(target=self._fill, args=(read,), daemon=True).start()

    def _fill(self, read: Callable[[], tuple[Origin, Sequence[Pick]]]) -> None:
        try:
            origin, found = read()
        except (QloraDpoError, OSError):  # then there is nothing to pick, and any prompt can be written
            origin, found = "pick", ()
        self._found, self._origin = found[:MOST], origin

    def picks(self) -> tuple[Origin, Sequence[Pick]]:
        """What there is now.

        Raises:
            DataError, StorageError: the recorded prompts cannot be read.
        """
        rows = self._source.recorded().rows
        if rows:
            return "pick_recorded", [of_row(row) for row in rows[:MOST]]
        return self._origin, self._found

    def prompt_of(self, text: str) -> str | Sequence[Message]:
        """The prompt whose text this is: a conversation that was picked is asked as such."""
        try:
            found = self.picks()[1]
        except QloraDpoError:
            return text
        return next((pick.prompt for pick in found if pick.text.strip() == text), text)


def of_row(row: Row) -> Pick:
    """A recorded prompt."""
    return Pick(row.prompt, row.category, row.reference_answer, row)
