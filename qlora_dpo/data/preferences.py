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
