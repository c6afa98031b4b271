"""`opendpo`: a context of messages, an answer message each, log-probs of the reference, a category (OpenDPO)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from qlora_dpo.data.messages import answer_of, check_prompt, messages_of
from qlora_dpo.data.pair_formats.layout import message_pair
from qlora_dpo.data.preferences import ColumnNames, ParsedPair, PreferencePair, RowError
from qlora_dpo.data.values import Values, clean_text, kind, shown, value_of

LOGPS = ("reference_chosen_log_prob", "reference_rejected_log_prob")
COLUMNS = (
    "context (messages), chosen, rejected (a message each), reference_chosen_log_prob, reference_rejected_log_prob, "
    "meta (category_id, category_name)"
)
EXAMPLE: dict[str, Any] = {
    "context": [{"role": "user", "content": "What is 2 + 3?"}],
    "chosen": {"role": "assistant", "content": "5"},
    "rejected": {"role": "assistant", "content": "6"},
    "reference_chosen_log_prob": -0.7,
    "reference_rejected_log_prob": -4.2,
    "meta": {"category_name": "math"},
}


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form."""
    return "context", names.chosen, names.rejected, *LOGPS, "meta"


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    answers = all(isinstance(values.get(column), dict) for column in (names.chosen, names.rejected))
    return answers and names.prompt not in values and isinstance(values.get("context"), (list, dict))


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    context = messages_of("context", value_of(values, "context"))
    check_prompt("context", context)
    chosen, rejected = (answer_of(column, value_of(values, column)) for column in (names.chosen, names.rejected))
    pair = message_pair(context, chosen, rejected)
    return ParsedPair(replace(pair, category=_category(values), reference_logps=_reference_logps(values)))


def _category(values: Values) -> str | None:
    """The category's name, else its number as text."""
    meta = values.get("meta")
    if meta is None:
        return None
    if not isinstance(meta, dict):
        raise RowError("meta", f"must be an object (it is {kind(meta)})")
    if meta.get("category_name"):
        return clean_text("meta.category_name", meta["category_name"])
    number = meta.get("category_id")
    if number is None or number == "":
        return None
    if isinstance(number, bool) or not isinstance(number, (int, str)):
        raise RowError("meta.category_id", f"must be a number or text (it is {kind(number)})")
    return clean_text("meta.category_id", number if isinstance(number, str) else shown(number))


def _reference_logps(values: Values) -> tuple[float, float] | None:
    given = [values.get(column) for column in LOGPS]
    if given == [None, None]:
        return None
    for column, value in zip(LOGPS, given, strict=True):
        if value is None:
            raise RowError(column, "missing, although the other answer's is there")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RowError(column, f"must be a number (it is {kind(value)})")
        if not _is_log_prob(value):
            raise RowError(column, f"must be finite and at most 0 (it is {shown(value)})")
    return float(given[0]), float(given[1])  # type: ignore[arg-type]


def _is_log_prob(value: int | float) -> bool:
    try:
        return math.isfinite(value) and value <= 0
    except OverflowError:  # an integer beyond the floats
        return False


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row."""
    row: dict[str, Any] = {
        "context": list(pair.messages),
        "chosen": dict(pair.chosen_message),
        "rejected": dict(pair.rejected_message),
    }
    if pair.reference_logps is not None:
        row |= dict(zip(LOGPS, pair.reference_logps, strict=True))
    if pair.category is not None:
        row["meta"] = {"category_name": pair.category}
    return row
