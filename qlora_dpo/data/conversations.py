"""The forms a row of SFT data can have, an entry of `CONVERSATION_FORMATS` each, and how it becomes a `Conversation`.

Every format may carry `category` (text) and the columns of `columns.CONTENT`. All other columns that a format does
not read are named to the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from qlora_dpo.data.columns import add_content, category_of, without
from qlora_dpo.data.conversation_layouts import LAYOUTS, ConversationLayout, read_answered
from qlora_dpo.data.messages import check_all_learned, is_silent, messages_of, with_saved_messages
from qlora_dpo.data.preferences import Message, RowError
from qlora_dpo.data.saved_text import is_written_messages
from qlora_dpo.data.unclear import LABELS, is_labelled, unclear
from qlora_dpo.data.values import Values, value_of
from qlora_dpo.errors import UsageError

LABELLED = (
    "one answer with a label, good or bad: SFT would learn the bad ones, too. Keep the rows with good answers without "
    "the label (--ignore_columns label), or make pairs for DPO of them with `data pair`"
)
AFTER_THE_LAST_ANSWER = "messages after the last answer, which nothing is learned from, left out"

WRITTEN_MESSAGES = "messages that were saved as text would be learned as that (within a message of the {role})"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of which the assistant's are learned; the last is the assistant's."""

    messages: tuple[Message, ...]
    category: str | None = None
    origin: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParsedConversation:
    """A conversation and the names of the repairs that made it usable."""

    conversation: Conversation
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConversationColumns:
    """Which columns hold the messages, or the prompt and the response."""

    messages: str = "messages"
    prompt: str = "prompt"
    response: str = "response"
    category: str = "category"
    """Empty: no column holds it."""
    ignore_columns: tuple[str, ...] = ()
    """Columns that are as good as absent."""


@dataclass(frozen=True, slots=True)
class ConversationFormat:
    """One form of data: its columns in words, how to know it by a row, and how to read one."""

    columns: str
    matches: Callable[[Values, ConversationColumns], bool]
    parse: Callable[[Values, ConversationColumns], ParsedConversation]
    reads: Callable[[ConversationColumns], tuple[str, ...]]
    """The columns that `parse` reads."""


def parse_conversation(name: str, values: Values, names: ConversationColumns, origin: str) -> ParsedConversation:
    """Read one row of a named format.

    Raises:
        RowError: when the row is no usable conversation.
    """
    read = conversation_columns_read(name, names)
    values = with_saved_messages(without(values, names.ignore_columns), read)
    if is_labelled(values):
        raise RowError(next(column for column in LABELS if column in values), f"the row is {LABELLED}")
    for column in read:
        check_all_learned(column, values.get(column))
    parsed = CONVERSATION_FORMATS[name].parse(values, names)
    conversation = replace(parsed.conversation, category=category_of(values, names.category), origin=origin)
    content = add_content(values, read, conversation.messages)
    if content is None:
        return replace(parsed, conversation=conversation)
    conversation = replace(
        conversation,
        messages=tuple(content.messages),
        tools=conversation.tools or content.tools,
        chat_template_kwargs=conversation.chat_template_kwargs or content.chat_template_kwargs,
    )
    return ParsedConversation(conversation, (*parsed.repairs, *content.repairs))


@lru_cache
def conversation_columns_read(name: str, names: ConversationColumns) -> frozenset[str]:
    """The columns that a format reads, by its name; with `auto` those that any format would.

    The columns of `columns.CONTENT` are read beside these, whatever the format.
    """
    forms = CONVERSATION_FORMATS.values() if name == "auto" else [CONVERSATION_FORMATS[name]]
    read = {column for form in forms for column in form.reads(names)}
    return frozenset(read | {names.category}) - {"", *names.ignore_columns}


def detect_conversation_format(values: Values, names: ConversationColumns | None = None) -> str:
    """Name the format of a row by its columns and their types.

    Raises:
        UsageError: when no format, or more than one, fits.
    """
    names = names or ConversationColumns()
    values = with_saved_messages(without(values, names.ignore_columns), values)
    fitting = fitting_formats(values, names)
    if fitting and is_labelled(values):
        raise UsageError(f"each row is {LABELLED}.")
    if len(fitting) == 1:
        return fitting[0]
    if names.prompt in values and "chosen" in values and "rejected" in values:
        raise UsageError("the rows are pairs (chosen, rejected): train on them with --objective dpo.")
    forms = {
        name: (form.columns, LAYOUTS[name].needs if name in LAYOUTS else form.reads(names))
        for name, form in CONVERSATION_FORMATS.items()
    }
    flags = {names.messages: "--messages_key", names.prompt: "--prompt_key", names.response: "--response_key"}
    raise unclear(values, forms, fitting, flags)


def fitting_formats(values: Values, names: ConversationColumns) -> list[str]:
    """The formats that a row has by its columns; those of `LAYOUTS` where the usual names are not there."""
    usual = [name for name, form in CONVERSATION_FORMATS.items() if name not in LAYOUTS and form.matches(values, names)]
    return usual or [name for name, layout in LAYOUTS.items() if layout.matches(values)]


def check_conversation_format(name: str) -> None:
    """Refuse a format name that is not in the table.

    Raises:
        UsageError: with the nearest known name.
    """
    if name in CONVERSATION_FORMATS:
        return
    near = difflib.get_close_matches(name, CONVERSATION_FORMATS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    known = ", ".join(["auto", *CONVERSATION_FORMATS])
    raise UsageError(f"--dataset_format {name!r} is not known for --objective sft; choose {known}.{hint}")


def _parse_messages(values: Values, names: ConversationColumns) -> ParsedConversation:
    messages = messages_of(names.messages, value_of(values, names.messages), may_end_empty=True)
    return _of_messages(names.messages, messages)


def _of_messages(column: str, messages: list[Message], repairs: tuple[str, ...] = ()) -> ParsedConversation:
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError(column, "no message is the assistant's, so there is nothing to learn")
    if is_silent(messages[answers[-1]]):
        raise RowError(f"{column}[{answers[-1]}]", "the answer is empty")
    used = messages[: answers[-1] + 1]
    for message in used:
        if is_written_messages(message["content"]):
            raise RowError(column, WRITTEN_MESSAGES.format(role=message["role"]))
    left_out = (AFTER_THE_LAST_ANSWER,) if len(used) < len(messages) else ()
    return ParsedConversation(Conversation(tuple(used)), repairs + left_out)


def _parse_plaintext(values: Values, names: ConversationColumns) -> ParsedConversation:
    return _of_messages(names.response, *read_answered(values, names.prompt, names.response))


def _format_of(layout: ConversationLayout) -> ConversationFormat:
    return ConversationFormat(
        layout.columns,
        lambda values, _names: layout.matches(values),
        lambda values, _names: _of_messages(layout.needs[0], *layout.read(values)),
        lambda _names: (*layout.needs, *layout.also),
    )


CONVERSATION_FORMATS: dict[str, ConversationFormat] = {
    "messages": ConversationFormat(
        "messages (a list of messages with role and content, or from and value)",
        lambda values, names: isinstance(values.get(names.messages), list),
        _parse_messages,
        lambda names: (names.messages,),
    ),
    "plaintext": ConversationFormat(
        "prompt, response (text or messages)",
        lambda values, names: all(
            isinstance(values.get(column), (str, list, dict)) for column in (names.prompt, names.response)
        ),
        _parse_plaintext,
        lambda names: (names.prompt, names.response),
    ),
    **{name: _format_of(layout) for name, layout in LAYOUTS.items()},
}
