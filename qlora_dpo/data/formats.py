"""The forms a row of preference data can have, an entry of `FORMATS` each, and how it becomes a
`PreferencePair`.

Columns that a format does not name are ignored, except `category` (text) and `confidence` (a number in
(0, 1]), which every format may carry.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_dpo.data.hh_rlhf import JOINED_TURNS, common_history, split_dialogue
from qlora_dpo.data.preferences import Message, PreferencePair, RowError
from qlora_dpo.errors import UsageError

ROLES = ("system", "user", "assistant")

Values = Mapping[str, Any]

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Which columns hold the prompt and the two answers."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"


@dataclass(frozen=True, slots=True)
class ParsedPair:
    """A pair and the names of the repairs that made it usable."""

    pair: PreferencePair
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Format:
    """One form of data: how to know it by its first row, and how to read a row of it."""

    columns: str
    matches: Callable[[Values, ColumnNames], bool]
    parse: Callable[[Values, ColumnNames], ParsedPair]


def parse_row(name: str, values: Values, names: ColumnNames, origin: str) -> ParsedPair:
    """Read one row of a named format.

    Raises:
        RowError: when the row is no usable pair.
    """
    parsed = FORMATS[name].parse(values, names)
    pair = parsed.pair
    for column, answer in ((names.chosen, pair.chosen), (names.rejected, pair.rejected)):
        if not answer.strip():
            raise RowError(column, "the answer is empty")
    if pair.chosen == pair.rejected:
        raise RowError(names.rejected, "the same answer as chosen")
    return replace(
        parsed,
        pair=replace(pair, category=_category(values), confidence=_confidence(values), origin=origin),
    )


def detect_format(values: Values, names: ColumnNames | None = None) -> str:
    """Name the format of a row by its columns and their types.

    Raises:
        UsageError: when no format, or more than one, fits.
    """
    names = names or ColumnNames()
    fitting = [name for name, form in FORMATS.items() if form.matches(values, names)]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{column} ({_kind(value)})" for column, value in values.items()) or "none"
    known = "; ".join(f"{name}: {form.columns}" for name, form in FORMATS.items())
    raise UsageError(
        f"cannot tell the format of the data: its columns are {found}. Known formats: {known}. "
        "Name one with --dataset_format, or the columns with --prompt_key, --chosen_key and --rejected_key."
    )


def check_format(name: str) -> None:
    """Refuse a format name that is not in the table.

    Raises:
        UsageError: with the nearest known name.
    """
    if name in FORMATS:
        return
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"--dataset_format {name!r} is not known; choose auto, {', '.join(FORMATS)}.{hint}")


def _parse_hh_rlhf(values: Values, names: ColumnNames) -> ParsedPair:
    chosen, chosen_joined = split_dialogue(names.chosen, _text(values, names.chosen))
    rejected, rejected_joined = split_dialogue(names.rejected, _text(values, names.rejected))
    history = common_history(chosen, rejected)
    pair = PreferencePair(history, chosen[-1]["content"], rejected[-1]["content"])
    return ParsedPair(pair, (JOINED_TURNS,) if chosen_joined or rejected_joined else ())


def _parse_plaintext(values: Values, names: ColumnNames) -> ParsedPair:
    prompt = _text(values, names.prompt)
    if not prompt.strip():
        raise RowError(names.prompt, "the prompt is empty")
    return ParsedPair(PreferencePair(prompt, _text(values, names.chosen), _text(values, names.rejected)))


def _parse_messages(values: Values, names: ColumnNames) -> ParsedPair:
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
    if not prompt or prompt[-1]["role"] != "user":
        raise RowError(names.prompt, "the message before the answers must be the user's")
    return ParsedPair(PreferencePair(tuple(prompt), chosen, rejected))


def _prompt_messages(values: Values, column: str) -> list[Message]:
    value = _value(values, column)
    if isinstance(value, str):
        value = {"role": "user", "content": value}
    return _messages(column, value)


def _conversation(values: Values, column: str) -> tuple[list[Message], str]:
    """Split an answer column into the messages before the answer and the answer itself."""
    value = _value(values, column)
    if isinstance(value, str):
        return [], _clean(column, value)
    *history, answer = _messages(column, value, may_end_empty=True)
    if answer["role"] != "assistant":
        raise RowError(column, f"the last message must be the assistant's (it is by {answer['role']})")
    return history, answer["content"]


def _messages(column: str, value: object, may_end_empty: bool = False) -> list[Message]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise RowError(column, "an empty list of messages")
    messages = [_message(f"{column}[{number}]", item) for number, item in enumerate(items)]
    for number, message in enumerate(messages[:-1] if may_end_empty else messages):
        # An empty system message is common and means "no system prompt".
        if not message["content"].strip() and message["role"] != "system":
            raise RowError(f"{column}[{number}].content", "an empty message")
    return messages


def _message(field: str, item: object) -> Message:
    if not isinstance(item, dict):
        raise RowError(field, f"a message must be an object with role and content (it is {_kind(item)})")
    role = item.get("role")
    if role not in ROLES:
        raise RowError(f"{field}.role", f"must be one of {', '.join(ROLES)} (it is {_shown(role)})")
    extra = [key for key, value in item.items() if key not in ("role", "content") and value is not None]
    if extra:
        raise RowError(field, f"a message has keys besides role and content ({_shown(extra[0])})")
    return {"role": role, "content": _text(item, "content", f"{field}.content")}


def _value(values: Values, column: str) -> Any:
    if column not in values:
        raise RowError(column, "missing")
    if values[column] is None:
        raise RowError(column, "null")
    return values[column]


def _text(values: Values, column: str, field: str | None = None) -> str:
    field = field or column
    if column not in values:
        raise RowError(field, "missing")
    return _clean(field, values[column])


def _clean(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise RowError(field, "null" if value is None else f"must be text (it is {_kind(value)})")
    # A JSON escape can hold half a surrogate pair, which no encoding of text can express.
    if not value.isascii() and _HALF_CHARACTER.search(value):
        raise RowError(field, "holds half of a surrogate pair, which is no character")
    return value


def _category(values: Values) -> str | None:
    if values.get("category") is None:
        return None
    return _text(values, "category")


def _confidence(values: Values) -> float:
    value = values.get("confidence")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError("confidence", f"must be a number (it is {_kind(value)})")
    # Written so that NaN, which compares false with everything, is refused too.
    if not 0 < value <= 1:
        raise RowError("confidence", f"must be above 0 and at most 1 (it is {_shown(value)})")
    return float(value)


def _kind(value: object) -> str:
    names = {str: "text", dict: "object", list: "list", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 40 else text[:37] + "..."


def _all_text(values: Values, *columns: str) -> bool:
    return all(isinstance(values.get(column), str) for column in columns)


def _holds_dialogues(values: Values, names: ColumnNames) -> bool:
    return _all_text(values, names.chosen, names.rejected) and all(
        values[column].lstrip().startswith("Human:") for column in (names.chosen, names.rejected)
    )


def _looks_like_hh_rlhf(values: Values, names: ColumnNames) -> bool:
    return names.prompt not in values and _holds_dialogues(values, names)


def _looks_like_plaintext(values: Values, names: ColumnNames) -> bool:
    # A prompt beside whole dialogues could mean either; the user has to say.
    columns = (names.prompt, names.chosen, names.rejected)
    return _all_text(values, *columns) and not _holds_dialogues(values, names)


def _looks_like_messages(values: Values, names: ColumnNames) -> bool:
    if names.chosen not in values or names.rejected not in values:
        return False
    prompt, chosen, rejected = (
        isinstance(values.get(column), (list, dict)) for column in (names.prompt, names.chosen, names.rejected)
    )
    return prompt or (chosen and rejected)


FORMATS: dict[str, Format] = {
    "hh-rlhf": Format(
        "chosen, rejected (dialogues '\\n\\nHuman: ... \\n\\nAssistant: ...')",
        _looks_like_hh_rlhf,
        _parse_hh_rlhf,
    ),
    "plaintext": Format("prompt, chosen, rejected (text)", _looks_like_plaintext, _parse_plaintext),
    "messages": Format(
        "chosen, rejected (messages with role and content), prompt (the same, or absent)",
        _looks_like_messages,
        _parse_messages,
    ),
}
