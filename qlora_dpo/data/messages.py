"""Messages out of the columns of a row, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from qlora_dpo.data.message_fields import calls_of, joined_parts, other_fields
from qlora_dpo.data.preferences import Message, NoPlaceError, PreferencePair, RowError
from qlora_dpo.data.saved_text import saved_messages, saved_parts
from qlora_dpo.data.values import Values, clean_text, kind, shown


@dataclass(frozen=True, slots=True)
class MessageKeys:
    """How a message is spelled: the keys of speaker and text, and what the speakers are called."""

    role: str
    content: str
    roles: Mapping[str, str]
    other_roles: Mapping[str, str]
    """Those that only some programs write."""


OPENAI = MessageKeys(
    "role",
    "content",
    {role: role for role in ("system", "user", "assistant", "tool")},
    {"developer": "system", "function": "tool", "ipython": "tool"},
)
SHAREGPT = MessageKeys(
    "from",
    "value",
    {"system": "system", "human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"},
    {"observation": "tool", "tool": "tool", "function_response": "tool", "function_call": "assistant"},
)


def keys_of(value: object) -> MessageKeys:
    """Which of the two spellings a message, or the first of a list, has."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict) or SHAREGPT.role not in first:
        return OPENAI
    # Arrow writes all keys that any row has: those of the other spelling are null.
    return OPENAI if first[SHAREGPT.role] is None and first.get(OPENAI.role) is not None else SHAREGPT


def messages_of(column: str, value: object, *, may_end_empty: bool = False) -> list[Message]:
    """Read a list of messages, or one message, that is the value of a column.

    Raises:
        RowError: when it is none, or a message but the system's and the tools' is empty (`may_end_empty`: the last one
            may be).
    """
    items = value if isinstance(value, list) else [value]
    if not items:
        raise RowError(column, "an empty list of messages")
    keys = keys_of(value)
    messages = [message_of(f"{column}[{number}]", item, keys) for number, item in enumerate(items)]
    for number, message in enumerate(messages[:-1] if may_end_empty else messages):
        # An empty system message is common and means "no system prompt"; a tool may find nothing.
        if is_silent(message) and message["role"] not in ("system", "tool"):
            raise RowError(f"{column}[{number}].{keys.content}", "an empty message")
    return messages


def is_silent(message: Message) -> bool:
    """The message has no text and calls no tool."""
    return not message["content"].strip() and "tool_calls" not in message


def message_of(field: str, item: object, keys: MessageKeys | None = None) -> Message:
    """Read one message.

    Raises:
        RowError: when it is none, or says more than a message of the contract holds.
    """
    keys = keys or keys_of(item)
    if not isinstance(item, dict):
        raise RowError(field, f"a message must be an object with {keys.role} and {keys.content} (it is {kind(item)})")
    role = item.get(keys.role)
    known = (keys.roles.get(role) or keys.other_roles.get(role)) if isinstance(role, str) else None
    if known is None:
        raise RowError(f"{field}.{keys.role}", f"must be one of {', '.join(keys.roles)} (it is {shown(role)})")
    content = item.get(keys.content)
    if role == "function_call":
        return {"role": known, "content": "", "tool_calls": calls_of(f"{field}.{keys.content}", content)}
    more = (
        {} if len(item) == 2 and keys.content in item else other_fields(field, item, (keys.role, keys.content), known)
    )
    if content is None and "tool_calls" in more:
        content = ""
    elif keys.content not in item:
        raise RowError(f"{field}.{keys.content}", "missing")
    parts = saved_parts(content) if isinstance(content, str) else content
    text = joined_parts(f"{field}.{keys.content}", parts) if isinstance(parts, list) else content
    return {"role": known, "content": clean_text(f"{field}.{keys.content}", text), **more}  # type: ignore[typeddict-item]


def answer_of(column: str, value: object) -> Message:
    """Read the one message of an answer column, which must be the assistant's.

    Raises:
        RowError: when it is not.
    """
    message = message_of(column, value)
    if message["role"] != "assistant":
        raise RowError(
            f"{column}.{keys_of(value).role}", f"the answer must be the assistant's (it is by {message['role']})"
        )
    return message


def check_texts_only(pair: PreferencePair) -> None:
    """Refuse a pair that a format of texts has no place for.

    Raises:
        NoPlaceError: when a message has a thought.
        RowError: when one calls a tool, is a tool's, or has a name.
    """
    answers = (("chosen", pair.chosen_message), ("rejected", pair.rejected_message))
    for field, message in (*(("prompt", message) for message in pair.messages), *answers):
        if "reasoning_content" in message:
            raise NoPlaceError(field, "a thought", "thoughts")
        if message["role"] == "tool" or len(message) > 2:
            raise RowError(field, "the format has no place for calls of tools, and for names")


def with_saved_messages(values: Values, columns: Collection[str]) -> Values:
    """The row with messages that were saved as text in these columns as messages.

    Raises:
        RowError: when one begins as messages and cannot be read.
    """
    found = {
        column: messages
        for column in columns
        if isinstance(text := values.get(column), str) and (messages := saved_messages(column, text)) is not None
    }
    return {**values, **found} if found else values


def check_all_learned(column: str, value: object) -> None:
    """Refuse messages of which an answer is not to be learned.

    Raises:
        RowError: when the weight of an answer is 0.
    """
    for number, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, dict) and item.get("weight") == 0 and item.get(keys_of(item).role) in ("assistant", "gpt"):
            reason = "answers that are not to be learned are not supported (it is 0)"
            raise RowError(f"{column}[{number}].weight", reason)


def check_prompt(column: str, messages: Sequence[Message]) -> None:
    """Refuse messages that no answer can follow.

    Raises:
        RowError: when the last is not the user's, nor what a tool gave back.
    """
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise RowError(column, "the message before the answers must be the user's")


_MAY_FOLLOW = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


def check_turns(column: str, messages: Sequence[Message]) -> None:
    """Refuse a prompt that is not: a system message or none, then user (or tools) and assistant in turns, the
    assistant not last.

    Raises:
        RowError: with the number of the first message that is out of turn.
    """
    check_prompt(column, messages)
    may_follow: tuple[str, ...] = ("user",)
    start = messages[0]["role"] == "system"
    for number, message in enumerate(messages[start:]):
        if message["role"] not in may_follow:
            raise RowError(column, f"user and assistant do not take turns (message {number + start + 1})")
        may_follow = _MAY_FOLLOW[message["role"]]
