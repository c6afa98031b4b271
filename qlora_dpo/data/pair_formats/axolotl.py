"""`axolotl`: the dialogue as `messages`, and an answer message each (Axolotl's chat_template DPO)."""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import check_prompt, messages_of
from qlora_dpo.data.pair_formats.layout import answer_message, message_pair
from qlora_dpo.data.preferences import ColumnNames, ParsedPair
from qlora_dpo.data.values import Values, value_of

COLUMNS = "messages (which end with the user's), chosen, rejected (a message each), system"
EXAMPLE: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 2 + 3?"}],
    "chosen": {"role": "assistant", "content": "5"},
    "rejected": {"role": "assistant", "content": "6"},
}


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    answers = all(_is_one_message(values.get(column)) for column in (names.chosen, names.rejected))
    return answers and names.prompt not in values and isinstance(values.get("messages"), list)


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form; `system` belongs to every form."""
    return "messages", names.chosen, names.rejected


def _is_one_message(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and len(value) == 1)


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    messages = messages_of("messages", value_of(values, "messages"))
    check_prompt("messages", messages)
    chosen, rejected = (answer_message(column, value_of(values, column)) for column in (names.chosen, names.rejected))
    return ParsedPair(message_pair(messages, chosen, rejected))
