"""`axolotl`: the dialogue as `messages`, and an answer message each (Axolotl's chat_template DPO)."""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import Values, check_prompt, keys_of, messages_of, value_of
from qlora_dpo.data.pair_formats.layout import answer_message, message_pair
from qlora_dpo.data.pair_formats.sharegpt import refuse_unsupported, with_system
from qlora_dpo.data.preferences import ColumnNames, ParsedPair

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


def _is_one_message(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and len(value) == 1)


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    refuse_unsupported(values)
    turns = value_of(values, "messages")
    messages = messages_of("messages", turns, keys=keys_of(turns))
    check_prompt("messages", messages)
    chosen, rejected = (answer_message(column, value_of(values, column)) for column in (names.chosen, names.rejected))
    return ParsedPair(message_pair(with_system(values, messages), chosen, rejected))
