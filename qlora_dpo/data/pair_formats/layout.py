"""A form of data that is read and not written: how some data set or tool lays out its rows, known by its columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.messages import messages_of
from qlora_dpo.data.pair_formats.hh_rlhf import DIALOGUE, answer_in_dialogue, open_dialogue
from qlora_dpo.data.preferences import ColumnNames, Message, ParsedPair, PreferencePair, RowError
from qlora_dpo.data.values import Values, kind, optional_text_of, text_of

Prompt = str | tuple[Message, ...]


@dataclass(slots=True)
class Layout:
    """One such form: a row of it has all columns of `needs`, and no pair under the usual names of the columns."""

    COLUMNS: str
    EXAMPLE: dict[str, Any]
    needs: tuple[str, ...]
    read: Callable[[Values], ParsedPair]
    also: tuple[str, ...] = ()
    """Further columns that it reads."""
    is_variant: bool = False
    """Another reading of the columns of some form: it is named with --dataset_format, and never found."""

    def reads(self, _names: ColumnNames) -> tuple[str, ...]:
        """The columns of this form."""
        return *self.needs, *self.also

    def matches(self, values: Values, names: ColumnNames) -> bool:
        """Tell by its columns whether a row has this form."""
        is_pair = names.chosen in values and names.rejected in values
        return not self.is_variant and not is_pair and all(column in values for column in self.needs)

    def parse(self, values: Values, _names: ColumnNames) -> ParsedPair:
        """Read a row. Raises: RowError."""
        return self.read(values)


def text_prompt(values: Values, column: str, more: str | None = None) -> Prompt:
    """A prompt that is text: one question, or a dialogue in the form of hh-rlhf that waits for its answer.

    The text of the column `more`, if there is any, stands behind it on a line of its own.

    Raises:
        RowError: when it is empty, or no text.
    """
    parts = text_of(values, column), optional_text_of(values, more) if more else ""
    text = "\n".join(part for part in parts if part)
    if not text.strip():
        raise RowError(column, "the prompt is empty")
    return open_dialogue(text) or text


def text_pair(prompt: Prompt, chosen: str, rejected: str) -> ParsedPair:
    """A pair of two texts, as answers to a dialogue where the prompt is one."""
    if isinstance(prompt, str):
        return ParsedPair(PreferencePair(prompt, chosen, rejected))
    return ParsedPair(PreferencePair(prompt, answer_in_dialogue(chosen), answer_in_dialogue(rejected)), (DIALOGUE,))


def message_pair(prompt: Sequence[Message], chosen: Message, rejected: Message, **more: Any) -> PreferencePair:
    """A pair of two messages, with all that they hold besides their text."""
    return PreferencePair(
        tuple(prompt),
        chosen["content"],
        rejected["content"],
        chosen_fields=_fields(chosen),
        rejected_fields=_fields(rejected),
        **more,
    )


def _fields(message: Message) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in ("role", "content")}


def answer_message(column: str, value: object) -> Message:
    """The assistant's answer: a message, a list of one, or its text.

    Raises:
        RowError: when it is none.
    """
    if isinstance(value, str):
        return {"role": "assistant", "content": value}
    messages = dialogue_of(column, value)
    if len(messages) > 1:
        raise RowError(column, f"must be one message, the answer (there are {len(messages)})")
    return messages[0]


def dialogue_of(column: str, value: object) -> list[Message]:
    """Messages that end with the assistant's.

    Raises:
        RowError: when they do not.
    """
    messages = messages_of(column, value, may_end_empty=True)
    if messages[-1]["role"] != "assistant":
        raise RowError(column, f"the last message must be the assistant's (it is by {messages[-1]['role']})")
    return messages


def number_of(values: Values, column: str) -> float:
    """The number in a column.

    Raises:
        RowError: when there is none.
    """
    value = values.get(column)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(column, f"must be a number (it is {kind(value)})")
    return value
