"""What to say about rows of which no format, or more than one, can be told by their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qlora_dpo.data.values import Values, kind, truth_of
from qlora_dpo.errors import UsageError

LABELS = ("label", "kto_tag")
"""Columns that say of a single answer whether it is good (TRL's KTO, LLaMA-Factory)."""

RATINGS = ("rating", "score", "helpfulness", "reward", "overall_score")
"""Columns that say how good it is."""


def is_labelled(values: Values) -> bool:
    """The row is one answer with a label, half of a pair."""
    return any(truth_of(values.get(column)) is not None for column in LABELS) and "chosen" not in values


def unclear(
    values: Values, forms: Mapping[str, tuple[str, Sequence[str]]], fitting: Sequence[str], flags: Mapping[str, str]
) -> UsageError:
    """The error that names the nearest format and the columns that are missing.

    `forms` has of each format its columns in words, and the names of those that it needs; `flags` has the options that
    name columns, by column.
    """
    found = ", ".join(f"{column} ({kind(value)})" for column, value in values.items()) or "none"
    start = f"cannot tell the format of the data: its columns are {found}."
    if fitting:
        return UsageError(f"{start} They fit {' and '.join(fitting)}: name one of these with --dataset_format.")
    name = max(forms, key=lambda name: _nearness(values, forms[name][1]))
    words, columns = forms[name]
    if not any(column in values for column in columns):
        return UsageError(
            f"{start} No format has one of these; docs/data.md lists the formats." + _naming(flags, flags)
        )
    missing = [column for column in columns if column not in values]
    what = f"missing: {', '.join(missing)}" if missing else "what is in them is of another kind"
    return UsageError(f"{start} The nearest format is {name}, with {words}; {what}." + _naming(missing, flags))


def _nearness(values: Values, columns: Sequence[str]) -> tuple[float, int]:
    """How much of a format is there: its share, then its number of columns."""
    shared = sum(column in values for column in columns)
    return shared / len(columns), shared


def _naming(missing: Sequence[str] | Mapping[str, str], flags: Mapping[str, str]) -> str:
    named = [flags[column] for column in missing if column in flags]
    return f" Where a column has another name, say so with {' and '.join(named)}." if named else ""
