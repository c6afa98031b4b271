"""A preference pair: one prompt with a better and a worse answer, and the rows that could not become one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from qlora_dpo.terminal import visible


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user, assistant or tool."""

    role: str
    content: str
    """Empty where the message is a call of tools alone."""
    reasoning_content: NotRequired[str]
    """A thought that the row keeps apart from the answer, whatever name it has there."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """As the OpenAI API writes them: `{"type": "function", "function": {"name": ..., "arguments": {...}}}`."""
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


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
    chosen_fields: Mapping[str, Any] = field(default_factory=dict)
    """What the message of the answer holds besides role and content: `reasoning_content`, `tool_calls`."""
    rejected_fields: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the model may call, for the chat template."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template that the row brings along; they outrank those of the run."""

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as messages."""
        if isinstance(self.prompt, str):
            return ({"role": "user", "content": self.prompt},)
        return self.prompt

    @property
    def chosen_message(self) -> Message:
        """The better answer as a message."""
        return {"role": "assistant", "content": self.chosen, **self.chosen_fields}  # type: ignore[typeddict-item]

    @property
    def rejected_message(self) -> Message:
        """The worse answer as a message."""
        return {"role": "assistant", "content": self.rejected, **self.rejected_fields}  # type: ignore[typeddict-item]


@dataclass(frozen=True, slots=True)
class ParsedPair:
    """The pair that a row holds and the names of the repairs that made it usable."""

    pair: PreferencePair
    repairs: tuple[str, ...] = ()
    more: tuple[PreferencePair, ...] = ()
    """Further pairs of the same row, where it ranks more than two answers."""


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Which columns hold the prompt and the two answers, and what else is known of a pair."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    category: str = "category"
    """Empty: no column holds it."""
    confidence: str = "confidence"
    """Empty: no column holds it."""
    ignore_columns: tuple[str, ...] = ()
    """Columns that are as good as absent."""


class Unread:
    """Stands for the value of a column that was left in its file because no format reads it."""


UNREAD = Unread()


@dataclass(frozen=True, slots=True)
class RefusedRow:
    """A row that is not trained on, where it stands and why; a reason's details come last, in brackets."""

    origin: str
    field: str
    reason: str
    left_out: bool = False
    """Nothing is wrong with the row, it only prefers neither answer: it is counted, and stops nothing."""

    def __str__(self) -> str:
        return visible(f"{self.origin}: {self.field}: {self.reason}")

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

    def refused(self, origin: str) -> RefusedRow:
        """The row as it is listed."""
        return RefusedRow(origin, self.field, self.reason, isinstance(self, NoPreferenceError))


class NoPreferenceError(RowError):
    """Raised by the parsers for a sound row that prefers neither answer, a tie: it is left out, with a count."""


class NoPlaceError(RowError):
    """Raised by the writers where a format has no place for a part of a pair; `drop` is what --drop calls it."""

    def __init__(self, field: str, part: str, drop: str) -> None:
        super().__init__(field, f"the format has no place for {part} (--drop {drop})")
        self.drop = drop
