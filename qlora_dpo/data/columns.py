"""Columns beside those that a format reads: content that no format may drop, and the names of those that nobody reads.

`CONTENT` is the one table of columns that some format knows to carry content. Whatever the format of a row, such a
column becomes a part of it, or the row is refused; `--ignore_columns` leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_dpo.data.messages import messages_of
from qlora_dpo.data.preferences import Message, RowError
from qlora_dpo.data.saved_text import object_of, parsed_text, saved_messages
from qlora_dpo.data.values import Values, clean_text, is_empty, kind

JOINED = "the column {column} joined to the prompt, on a line of its own"


@dataclass(slots=True)
class Content:
    """What a row says besides its answers, while its columns are added to it."""

    messages: list[Message]
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    repairs: tuple[str, ...] = ()


def add_content(values: Values, read: Collection[str], messages: Collection[Message]) -> Content | None:
    """Add the filled columns of `CONTENT` that the format did not read to its messages; None where there are none.

    Raises:
        RowError: when a column has no place there.
    """
    filled = [column for column in CONTENT if column in values and column not in read and not is_empty(values[column])]
    if not filled:
        return None
    content = Content([*messages])
    for column in filled:
        CONTENT[column](column, values[column], content)
    return content


def without(values: Values, columns: Collection[str]) -> Values:
    """The row without these columns."""
    return {column: value for column, value in values.items() if column not in columns} if columns else values


def category_of(values: Values, column: str) -> str | None:
    """The category of a row, None where it has none or no column is named.

    Raises:
        RowError: when the column holds something else than text.
    """
    category = values.get(column)
    if category is None or isinstance(category, str):
        return None if category is None else clean_text(column, category) or None
    way_out = "--category_key names another column, or '' for none"
    raise RowError(column, f"must be text (it is {kind(category)}; {way_out})")


def history_of(column: str, value: object) -> list[Message]:
    """Read earlier turns: pairs of texts, what user and assistant said, or messages.

    Raises:
        RowError: when they are neither.
    """
    turns = parsed_text(value) if isinstance(value, str) else value  # CSV knows only text
    if not isinstance(turns, list) or not turns:
        raise RowError(column, f"must be a list of pairs of texts (it is {kind(value)})")
    return _turns_of(column, turns)


def _turns_of(column: str, value: list[Any]) -> list[Message]:
    if isinstance(value[0], dict):
        return messages_of(column, value)
    messages: list[Message] = []
    for number, turn in enumerate(value):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(f"{column}[{number}]", "must be a pair of texts, what the user and the assistant said")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            if not clean_text(f"{column}[{number}]", text).strip():
                raise RowError(f"{column}[{number}]", "an empty message")
            messages.append({"role": role, "content": text})
    return messages


def _add_system(column: str, value: object, content: Content) -> None:
    text, messages = clean_text(column, value), content.messages
    if messages[0]["role"] != "system" or not messages[0]["content"]:
        content.messages = [{"role": "system", "content": text}, *messages[messages[0]["role"] == "system" :]]
    elif messages[0]["content"].strip() != text.strip():
        raise RowError(column, "another system prompt than that of the first turn" + _way_out(column))


def _add_text(column: str, value: object, content: Content) -> None:
    """Text that belongs to the question, as Alpaca's `input` does; or earlier turns."""
    if not isinstance(value, str):
        return _add_history(column, value, content)
    text = clean_text(column, value)
    if _is_said(text, content):
        return None
    place = _place_of_question(column, content)
    question = content.messages[place]
    content.messages[place] = {**question, "content": f"{question['content']}\n{text}"}
    content.repairs += (JOINED.format(column=column),)
    return None


def _add_history(column: str, value: object, content: Content) -> None:
    turns, messages = history_of(column, value), content.messages
    if any(messages[start : start + len(turns)] == turns for start in range(len(messages))):
        return
    place = _place_of_question(column, content)
    if turns[-1] == messages[place]:
        turns.pop()
    if turns and turns[-1]["role"] == "user":
        raise RowError(column, "ends with another question than the prompt" + _way_out(column))
    if turns and turns[0]["role"] == "system":
        _add_system(column, turns.pop(0)["content"], content)
        place = _place_of_question(column, content)
    content.messages[place:place] = turns


def _add_dialogue(column: str, value: object, content: Content) -> None:
    """The dialogue as other formats have it: the prompt, with turns before it or not, and maybe the answer."""
    if isinstance(value, str):
        value = saved_messages(column, value) or value
    if isinstance(value, str):
        return _check_said(column, value, content)
    if not isinstance(value, (list, dict)):
        return None
    asked, answers = _without_answers(content.messages)
    turns, said = _without_answers(messages_of(column, value, may_end_empty=True))
    system, turns = _without_system(turns)
    own_system, own = _without_system(asked)
    is_answered = bool(said and answers) and said != answers
    if is_answered or (system and own_system and system != own_system) or turns[-len(own) :] != own:
        if any(asked[start : start + len(turns)] == turns for start in range(len(asked))) and not is_answered:
            return None
        raise RowError(column, "holds other messages than the row says besides" + _way_out(column))
    content.messages = [*(own_system or system), *turns, *answers]
    return None


def _without_answers(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The messages up to the last that is not the assistant's, and those behind it."""
    place = len(messages)
    while place and messages[place - 1]["role"] == "assistant":
        place -= 1
    return messages[:place], messages[place:]


def _without_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    start = bool(messages) and messages[0]["role"] == "system"
    return messages[:start], messages[start:]


def _add_thought(column: str, value: object, content: Content) -> None:
    """The thought before the one answer of an SFT row."""
    thought, last = clean_text(column, value), content.messages[-1]
    if last["role"] != "assistant":
        raise RowError(column, "belongs to neither of the answers" + _way_out(column))
    if thought.strip() in last["content"]:
        return
    if last.get("reasoning_content", thought) != thought:
        raise RowError(column, "another thought than that of the answer" + _way_out(column))
    content.messages[-1] = {**last, "reasoning_content": thought}


def _check_said(column: str, value: object, content: Content) -> None:
    if not _is_said(clean_text(column, value), content):
        raise RowError(column, "holds a text that is not in the prompt" + _way_out(column))


def _is_said(text: str, content: Content) -> bool:
    """The text is a message, or whole lines of one."""
    return any(f"\n{text.strip()}\n" in f"\n{message['content'].strip()}\n" for message in content.messages)


def _place_of_question(column: str, content: Content) -> int:
    questions = [number for number, message in enumerate(content.messages) if message["role"] == "user"]
    if len(questions) != 1 or any(message["role"] == "tool" for message in content.messages):
        raise RowError(column, "has no place beside a prompt of several turns" + _way_out(column))
    return questions[0]


def _add_tools(column: str, value: object, content: Content) -> None:
    found = object_of(column, value, (list, dict))
    tools = [
        object_of(f"{column}[{number}]", tool)
        for number, tool in enumerate(found if isinstance(found, list) else [found])
    ]
    if not isinstance(value, str):  # Arrow writes all keys that any schema has, as null where one has it not
        tools = [_without_nulls(tool) for tool in tools]
    if column == "functions":  # as the OpenAI API had them before it had tools
        tools = [{"type": "function", "function": tool} for tool in tools]
    content.tools += tuple(tools)


def written_tools(tools: Collection[Any]) -> list[Any] | str:
    """Tools as a row has them: the JSON text of them where nulls in a list would be read as Arrow's."""
    found = list(tools)
    return found if _without_nulls(found) == found else json.dumps(found, ensure_ascii=False)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _add_template_arguments(column: str, value: object, content: Content) -> None:
    content.chat_template_kwargs = object_of(column, value)


def _refuse(column: str, _value: object, _content: Content) -> None:
    raise RowError(column, f"answers that need {column} are not supported" + _way_out(column))


def _way_out(column: str) -> str:
    return f" (--ignore_columns {column} leaves it out)"


# In this order: what is joined to the question comes before the turns before it, and the system prompt last.
CONTENT: dict[str, Callable[[str, Any, Content], None]] = {
    "messages": _add_dialogue,
    "conversations": _add_dialogue,
    "instruction": _check_said,
    "input": _add_text,
    "context": _add_text,
    "history": _add_history,
    "system": _add_system,
    "system_prompt": _add_system,
    "system_message": _add_system,
    "reasoning_content": _add_thought,
    "tools": _add_tools,
    "functions": _add_tools,
    "chat_template_kwargs": _add_template_arguments,
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "documents"), _refuse),
}


class UnreadColumns:
    """Collects the names of the columns that are not read, in the order in which they come up."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._seen: set[tuple[str, ...]] = set()

    def add(self, values: Values, read: Collection[str], ignored: Collection[str] = ()) -> None:
        """Take the columns of one row, of which a format reads these."""
        columns = tuple(values)
        if columns in self._seen:
            return
        self._seen.add(columns)
        known = (read, CONTENT)
        self._names |= dict.fromkeys(
            column for column in columns if column in ignored or not any(column in names for names in known)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The columns found so far."""
        return tuple(self._names)
