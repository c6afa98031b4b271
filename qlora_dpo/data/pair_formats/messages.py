"""`messages`: chosen and rejected as messages with role and content, the prompt too or implicit (TRL)."""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import check_prompt, messages_of
from qlora_dpo.data.pair_formats import axolotl
from qlora_dpo.data.pair_formats.hh_rlhf import open_dialogue
from qlora_dpo.data.pair_formats.layout import message_pair
from qlora_dpo.data.preferences import ColumnNames, Message, ParsedPair, PreferencePair, RowError
from qlora_dpo.data.values import Values, clean_text, is_empty, value_of

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
    answers = (chosen or rejected) if names.prompt in values else (chosen and rejected)
    return (prompt or answers) and not elsewhere


def _is_messages(values: Values, column: str) -> bool:
    return isinstance(values.get(column), (list, dict))


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form."""
    return names.prompt, names.chosen, names.rejected


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    _refuse_empty_list(values, names)
    chosen_before, chosen = _conversation(values, names.chosen)
    rejected_before, rejected = _conversation(values, names.rejected)
    # Nothing as the prompt is as good as none beside whole dialogues.
    if names.prompt in values and not (chosen_before and is_empty(values[names.prompt])):
        given = value_of(values, names.prompt)
        prompt = whole_prompt(names.prompt, given, names.chosen, chosen_before)
        other = whole_prompt(names.prompt, given, names.rejected, rejected_before)
    else:
        prompt, other = chosen_before, rejected_before
    if prompt != other:
        raise RowError(names.rejected, _difference(names, prompt, other))
    check_prompt(names.prompt, prompt)
    return ParsedPair(message_pair(prompt, chosen, rejected))


def whole_prompt(column: str, given: object, answer_column: str, before: list[Message]) -> list[Message]:
    """What stands before an answer: the prompt column, or the messages before the answer where these hold the prompt.

    `before` may begin with the prompt, with or without its system prompt; hold a prompt that is a text, or the last
    messages, of it; or go on where the prompt ends, with calls of tools.

    Raises:
        RowError: when the two do not fit together.
    """
    if isinstance(given, str):
        said = clean_text(column, given)
        if any(message["role"] == "user" and message["content"].strip() == said.strip() for message in before):
            return before
        prompt = list(open_dialogue(said) or messages_of(column, {"role": "user", "content": said}))
    else:
        prompt = messages_of(column, given)
    system, turns = _parts(prompt)
    system_before, turns_before = _parts(before)
    if not system or not system_before or system == system_before:
        if not turns or turns_before[: len(turns)] == turns or turns_before[-len(turns) :] == turns:
            return (system_before or system) + turns_before
        if not before or before[0]["role"] == "assistant":
            return prompt + before
    raise RowError(
        answer_column,
        f"the messages before its answer are not those of {column} (--ignore_columns {column} leaves it out)",
    )


def _refuse_empty_list(values: Values, names: ColumnNames) -> None:
    """An empty list that was saved as text beside messages is no answer `[]`."""
    answers = names.chosen, names.rejected
    if any(_is_messages(values, column) for column in answers):
        for column in answers:
            if isinstance(values.get(column), str) and is_empty(values[column]):
                raise RowError(column, "an empty list of messages")


def _parts(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system prompt, if there is one, and the turns."""
    start = bool(messages) and messages[0]["role"] == "system"
    return messages[:start], messages[start:]


def _difference(names: ColumnNames, prompt: list[Message], other: list[Message]) -> str:
    place = next(
        (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b), min(len(prompt), len(other))
    )
    acted = any(part[place:] and part[place]["role"] in ("assistant", "tool") for part in (prompt, other))
    if acted:
        return f"the answers are of several messages, and differ before the last of them (message {place + 1})"
    return f"the messages before its answer are not those of {names.chosen}"


def _conversation(values: Values, column: str) -> tuple[list[Message], Message]:
    """Split an answer column into the messages before the answer and the answer itself."""
    value = value_of(values, column)
    if isinstance(value, str):
        return [], {"role": "assistant", "content": clean_text(column, value)}
    *before, answer = messages_of(column, value, may_end_empty=True)
    if answer["role"] != "assistant":
        raise RowError(column, f"the last message must be the assistant's (it is by {answer['role']})")
    return before, answer


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row."""
    return {"prompt": list(pair.messages), "chosen": [pair.chosen_message], "rejected": [pair.rejected_message]}
