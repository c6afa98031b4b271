"""A preference pair: one prompt with a better and a worse answer, and the rows that could not become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt and two answers to it; a prompt that is plain text is one user message."""

    prompt: str | tuple[Message, ...]
    chosen: str
    rejected: str
    category: str | None = None
    confidence: float = 1.0
    origin: str = ""
    reference_logps: tuple[float, float] | None = None
    """Log-probs of the two answers under a reference model, as the row brings them along; not trained on."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as messages."""
        if isinstance(self.prompt, str):
            return ({"role": "user", "content": self.prompt},)
        return self.prompt


@dataclass(frozen=True, slots=True)
class ParsedPair:
    """A pair and the names of the repairs that made it usable."""

    pair: PreferencePair
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Which columns hold the prompt and the two answers."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that is not trained on, where it stands and why; a reason's details come last, in brackets."""

    origin: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.field}: {self.reason}"

    @property
    def kind(self) -> str:
        """The reason without its details, to count by."""
        return f"{self.field}: {self.reason.split(' (', 1)[0]}"


class RowError(Exception):
    """Raised by the parsers for one row; becomes a `RefusedRow` and never reaches the user."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class NoPlaceError(RowError):
    """Raised by the writers where a format has no place for a part of a pair; `drop` is what --drop calls it."""

    def __init__(self, field: str, part: str, drop: str) -> None:
        super().__init__(field, f"the format has no place for {part} (--drop {drop})")
        self.drop = drop
