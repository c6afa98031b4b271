"""Values out of the columns of a row, or the reason why there are none."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qlora_dpo.data.preferences import RowError, Unread

Values = Mapping[str, Any]

_KINDS: dict[type, str] = {
    str: "text",
    dict: "object",
    list: "list",
    bool: "boolean",
    int: "number",
    float: "number",
    Unread: "not read",
}
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_EMPTY_TEXTS = ("", "[]", "{}", "null", "None")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


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


def is_empty(value: object) -> bool:
    """The value is as good as absent: null, or a text, list or object that is empty (or the text of such a one).

    An object of nulls alone is what Arrow makes of an absent one.
    """
    if isinstance(value, str):
        return value.strip() in _EMPTY_TEXTS
    if isinstance(value, dict):
        return all(item is None for item in value.values())
    return value is None or value == []


def truth_of(value: object) -> bool | None:
    """What true, false, 1, 0 or the text of one of them says (CSV knows only text); None for anything else."""
    return _TRUTHS.get(str(value).strip().lower())


def all_text(values: Values, *columns: str) -> bool:
    """Every one of these columns is there and holds text."""
    return all(isinstance(values.get(column), str) for column in columns)


def kind(value: object) -> str:
    """What a JSON value is, in a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value:f}".replace("nan", "NaN").replace("inf", "infinity")
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def shown(value: object) -> str:
    """A value, short enough for a sentence."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 40 else text[:37] + "..."
