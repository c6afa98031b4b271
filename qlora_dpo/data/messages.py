"""Text and messages out of the columns of a row, or the reason why there are none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.preferences import Message, RowError

Values = Mapping[str, Any]

ROLES = ("system", "user", "assistant")

_TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class MessageKeys:
    """How a message is spelled: the keys of speaker and text, and what the speakers are called."""

    role: str
    content: str
    roles: Mapping[str, str]


OPENAI = MessageKeys("role", "content", {role: role for role in ROLES})
SHAREGPT = MessageKeys(
    "from",
    "value",
    {"system": "system", "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"},
)


def keys_of(value: object) -> MessageKeys:
    """Which of the two spellings a message, or the first of a list, has."""
    first = value[0] if isinstance(value, list) and value else value
    return SHAREGPT if isinstance(first, dict) and SHAREGPT.role in first else OPENAI


def messages_of(
    column: str, value: object, *, keys: MessageKeys = OPENAI, may_end_empty: bool = False
) -> list[Message]:
    """Read a list of messages, or one message, that is the value of a column.

    Raises:
        RowError: when it is none, or a message but the system's is empty (`may_end_empty`: the last one may be).
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        raise RowError(column, "an empty list of messages")
    messages = [message_of(f"{column}[{number}]", item, keys) for number, item in enumerate(items)]
    for number, message in enumerate(messages[:-1] if may_end_empty else messages):
        # An empty system message is common and means "no system prompt".
        if not message["content"].strip() and message["role"] != "system":
            raise RowError(f"{column}[{number}].{keys.content}", "an empty message")
    return messages


def message_of(field: str, item: object, keys: MessageKeys = OPENAI) -> Message:
    """Read one message.

    Raises:
        RowError: when it is none, or says more than who speaks and what.
    """
    if not isinstance(item, dict):
        raise RowError(field, f"a message must be an object with {keys.role} and {keys.content} (it is {kind(item)})")
    role = item.get(keys.role)
    if isinstance(role, str) and role in _TOOL_ROLES:
        raise RowError(f"{field}.{keys.role}", f"turns of tools and functions are not supported (it is {role})")
    if not isinstance(role, str) or role not in keys.roles:
        raise RowError(f"{field}.{keys.role}", f"must be one of {', '.join(keys.roles)} (it is {shown(role)})")
    extra = [key for key, value in item.items() if key not in (keys.role, keys.content) and value is not None]
    if extra:
        raise RowError(field, f"a message has keys besides {keys.role} and {keys.content} ({shown(extra[0])})")
    return {"role": keys.roles[role], "content": text_of(item, keys.content, f"{field}.{keys.content}")}


def answer_of(column: str, value: object, keys: MessageKeys = OPENAI) -> str:
    """Read the one message of an answer column, which must be the assistant's.

    Raises:
        RowError: when it is not.
    """
    message = message_of(column, value, keys)
    if message["role"] != "assistant":
        raise RowError(f"{column}.{keys.role}", f"the answer must be the assistant's (it is by {message['role']})")
    return message["content"]


def check_prompt(column: str, messages: Sequence[Message]) -> None:
    """Refuse messages that no answer can follow.

    Raises:
        RowError: when the last is not the user's.
    """
    if not messages or messages[-1]["role"] != "user":
        raise RowError(column, "the message before the answers must be the user's")


def check_turns(column: str, messages: Sequence[Message]) -> None:
    """Refuse a prompt that is not: a system message or none, then user and assistant in turns, the user last.

    Raises:
        RowError: with the number of the first message that is out of turn.
    """
    check_prompt(column, messages)
    start = messages[0]["role"] == "system"
    for number, message in enumerate(messages[start:]):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise RowError(column, f"user and assistant do not take turns (message {number + start + 1})")


def value_of(values: Values, column: str) -> Any:
    """Return what a column holds.

    Raises:
        RowError: when it is missing or null.
    """
    if column not in values:
        raise RowError(column, "missing")
    if values[column] is None:
        raise RowError(column, "null")
    return values[column]


def text_of(values: Values, column: str, field: str | None = None) -> str:
    """Return the text of a column; `field` is how the column is called in the reason.

    Raises:
        RowError: when it is missing, or no text.
    """
    if column not in values:
        raise RowError(field or column, "missing")
    return clean_text(field or column, values[column])


def optional_text_of(values: Values, column: str) -> str:
    """Return the text of a column, empty when it is missing or null.

    Raises:
        RowError: when it holds something else than text.
    """
    return "" if values.get(column) is None else text_of(values, column)


def clean_text(field: str, value: object) -> str:
    """Return a value that is text.

    Raises:
        RowError: when it is not, or cannot be written in any encoding.
    """
    if not isinstance(value, str):
        raise RowError(field, "null" if value is None else f"must be text (it is {kind(value)})")
    # A JSON escape can hold half a surrogate pair, which no encoding of text can express.
    if not value.isascii() and _HALF_CHARACTER.search(value):
        raise RowError(field, "holds half of a surrogate pair, which is no character")
    return value


def all_text(values: Values, *columns: str) -> bool:
    """Every one of these columns is there and holds text."""
    return all(isinstance(values.get(column), str) for column in columns)


def kind(value: object) -> str:
    """What a JSON value is, in a word."""
    names = {str: "text", dict: "object", list: "list", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value, short enough for a sentence."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 40 else text[:37] + "..."
