"""`sharegpt`: a conversation of human and gpt that ends with the human, and an answer message each
(LLaMA-Factory's ranking data; its messages may have role and content instead of from and value).
"""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import SHAREGPT, answer_of, check_texts_only, check_turns, messages_of
from qlora_dpo.data.pair_formats.layout import message_pair
from qlora_dpo.data.preferences import ColumnNames, ParsedPair, PreferencePair
from qlora_dpo.data.values import Values, value_of

COLUMNS = "conversations (messages with from and value), chosen, rejected (a message each), system"
EXAMPLE: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "What is 2 + 3?"}],
    "chosen": {"from": "gpt", "value": "5"},
    "rejected": {"from": "gpt", "value": "6"},
}
_SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    answers = all(isinstance(values.get(column), dict) for column in (names.chosen, names.rejected))
    return answers and names.prompt not in values and isinstance(values.get("conversations"), list)


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form; `system` and `tools` belong to every form."""
    return "conversations", names.chosen, names.rejected


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    prompt = messages_of("conversations", value_of(values, "conversations"))
    check_turns("conversations", prompt)
    chosen, rejected = (answer_of(column, value_of(values, column)) for column in (names.chosen, names.rejected))
    return ParsedPair(message_pair(prompt, chosen, rejected))


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row. Raises: RowError when user and assistant do not take turns."""
    check_texts_only(pair)
    check_turns("prompt", pair.messages)
    return {
        "conversations": [_said(message["role"], message["content"]) for message in pair.messages],
        "chosen": _said("assistant", pair.chosen),
        "rejected": _said("assistant", pair.rejected),
    }


def _said(role: str, text: str) -> dict[str, str]:
    return {SHAREGPT.role: _SPEAKERS[role], SHAREGPT.content: text}
