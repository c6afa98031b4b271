"""`messages`: chosen and rejected as messages with role and content, the prompt too or implicit (TRL)."""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import Values, check_prompt, clean_text, messages_of, value_of
from qlora_dpo.data.pair_formats import axolotl
from qlora_dpo.data.preferences import ColumnNames, Message, ParsedPair, PreferencePair, RowError

COLUMNS = "chosen, rejected (messages with role and content), prompt (the same, or absent)"
EXAMPLE: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "What is 2 + 3?"}],
    "chosen": [{"role": "assistant", "content": "5"}],
    "rejected": [{"role": "assistant", "content": "6"}],
}
_OTHER_PROMPTS = ("context", "conversations")  # where other formats of messages keep theirs


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    if names.chosen not in values or names.rejected not in values:
        return False
    prompt, chosen, rejected = (_is_messages(values, column) for column in (names.prompt, names.chosen, names.rejected))
    elsewhere = names.prompt not in values and any(_is_messages(values, column) for column in _OTHER_PROMPTS)
    elsewhere = elsewhere or axolotl.matches(values, names)
    return (prompt or (chosen and rejected)) and not elsewhere


def _is_messages(values: Values, column: str) -> bool:
    return isinstance(values.get(column), (list, dict))


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    chosen_history, chosen = _conversation(values, names.chosen)
    rejected_history, rejected = _conversation(values, names.rejected)
    if names.prompt in values:
        prompt = _prompt_messages(values, names.prompt)
        for column, history in ((names.chosen, chosen_history), (names.rejected, rejected_history)):
            if history and history != prompt:
                raise RowError(column, f"the messages before its answer are not those of {names.prompt}")
    else:
        prompt = chosen_history
        if rejected_history != prompt:
            raise RowError(names.rejected, f"the messages before its answer are not those of {names.chosen}")
    check_prompt(names.prompt, prompt)
    return ParsedPair(PreferencePair(tuple(prompt), chosen, rejected))


def _prompt_messages(values: Values, column: str) -> list[Message]:
    value = value_of(values, column)
    if isinstance(value, str):
        value = {"role": "user", "content": value}
    return messages_of(column, value)


def _conversation(values: Values, column: str) -> tuple[list[Message], str]:
    """Split an answer column into the messages before the answer and the answer itself."""
    value = value_of(values, column)
    if isinstance(value, str):
        return [], clean_text(column, value)
    *history, answer = messages_of(column, value, may_end_empty=True)
    if answer["role"] != "assistant":
        raise RowError(column, f"the last message must be the assistant's (it is by {answer['role']})")
    return history, answer["content"]


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row."""
    return {
        "prompt": list(pair.messages),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }
