"""`sharegpt`: a conversation of human and gpt that ends with the human, and an answer message each
(LLaMA-Factory's ranking data; its messages may have role and content instead of from and value).
"""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import (
    SHAREGPT,
    Values,
    answer_of,
    check_turns,
    keys_of,
    messages_of,
    optional_text_of,
    value_of,
)
from qlora_dpo.data.preferences import ColumnNames, Message, ParsedPair, PreferencePair, RowError

COLUMNS = "conversations (messages with from and value), chosen, rejected (a message each), system"
EXAMPLE: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "What is 2 + 3?"}],
    "chosen": {"from": "gpt", "value": "5"},
    "rejected": {"from": "gpt", "value": "6"},
}
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
_UNSUPPORTED = ("tools", "images", "videos", "audios")


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    answers = all(isinstance(values.get(column), dict) for column in (names.chosen, names.rejected))
    return answers and names.prompt not in values and isinstance(values.get("conversations"), list)


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    refuse_unsupported(values)
    turns = value_of(values, "conversations")
    messages = messages_of("conversations", turns, keys=keys_of(turns))
    check_turns("conversations", messages)
    prompt = with_system(values, messages)
    chosen, rejected = (_answer(values, column) for column in (names.chosen, names.rejected))
    return ParsedPair(PreferencePair(tuple(prompt), chosen, rejected))


def _answer(values: Values, column: str) -> str:
    value = value_of(values, column)
    return answer_of(column, value, keys_of(value))


def refuse_unsupported(values: Values) -> None:
    """Refuse what would be lost without a word.

    Raises:
        RowError: when the row brings tools, images, videos or sounds.
    """
    for column in _UNSUPPORTED:
        if values.get(column) not in (None, "", "[]", [], {}):
            raise RowError(column, f"answers that need {column} are not supported")


def with_system(values: Values, messages: list[Message]) -> list[Message]:
    """Put the text of the column `system`, where there is one, before the messages.

    Raises:
        RowError: when the messages begin with another system prompt.
    """
    system = optional_text_of(values, "system")
    if not system:
        return messages
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise RowError("system", "another system prompt than that of the first turn")
    return messages


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row. Raises: RowError when user and assistant do not take turns."""
    check_turns("prompt", pair.messages)
    return {
        "conversations": [_said(message["role"], message["content"]) for message in pair.messages],
        "chosen": _said("assistant", pair.chosen),
        "rejected": _said("assistant", pair.rejected),
    }


def _said(role: str, text: str) -> dict[str, str]:
    return {SHAREGPT.role: _SPEAKERS[role], SHAREGPT.content: text}
