"""Rules about what is not read: rows that are no pairs, by the reason for which they were refused, and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from qlora_dpo.data.completions import OPEN_THOUGHT
from qlora_dpo.data.linting.findings import Finding, Rule
from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.data.tokenization import EQUAL_AFTER_TRUNCATION

BadRows = Literal["fail", "skip", "known"]
"""Refused rows are errors, or warnings, or were reported before and are not repeated."""

RefusedCheck = Callable[[RefusedRow], bool]
ColumnCheck = Callable[[Sequence[str]], bool]

EQUAL_AFTER_CUT, NO_PREFERENCE, SKIPPED = "equal_after_cut", "no_preference", "skipped_row"

# The first that says yes takes the row.
REFUSED_RULES: tuple[Rule[RefusedCheck], ...] = (
    Rule(
        EQUAL_AFTER_CUT,
        "warning",
        "answers that differ only after the cut at --max_length, which are left out",
        "Raise --max_length, so that the difference is trained on.",
        lambda row: row.reason == EQUAL_AFTER_TRUNCATION,
    ),
    Rule(
        NO_PREFERENCE,
        "warning",
        "rows that prefer neither answer, which are left out",
        "Nothing to do; they are not trained on.",
        lambda row: row.left_out,
    ),
    Rule(
        "equal_pair",
        "error",
        "the same answer as chosen and as rejected",
        "Remove the row or correct one of its answers: it says nothing.",
        lambda row: row.reason in ("the same answer as chosen", "the same token ids as chosen"),
    ),
    Rule(
        "missing_answer",
        "error",
        "answers that are missing, empty or white space",
        "Write the answer or remove the row.",
        lambda row: row.reason in ("the answer is empty", "null", "missing") and row.field in ("chosen", "rejected"),
    ),
    Rule(
        "bad_row",
        "error",
        "rows that are no pair for any other reason",
        "Repair the row, or leave it out with --bad_rows skip.",
        lambda row: True,
    ),
    Rule(
        SKIPPED,
        "warning",
        "with --bad_rows skip: rows that are left out",
        "Nothing to do; they are not trained on.",
        lambda row: False,
    ),
)

COLUMN_RULES: tuple[Rule[ColumnCheck], ...] = (
    Rule(
        "unread_columns",
        "warning",
        "columns that nothing reads",
        "Nothing to do where they hold nothing to train on; else give them a name that the format knows.",
        bool,
    ),
)


def unread_columns(source: str, columns: Sequence[str]) -> Iterator[Finding]:
    """What there is to say about the columns of a source that nothing reads."""
    for rule in COLUMN_RULES:
        if rule.check(columns):
            yield Finding(source, rule.name, f"not read: {', '.join(columns)}")


def refused_rows(rows: Iterable[RefusedRow], bad_rows: BadRows) -> Iterator[Finding]:
    """What there is to say about refused rows."""
    for row in rows:
        name = next(rule.name for rule in REFUSED_RULES if rule.check(row))
        is_bad = name not in (EQUAL_AFTER_CUT, NO_PREFERENCE)
        if bad_rows == "known" and name != EQUAL_AFTER_CUT:
            continue
        if bad_rows == "skip" and is_bad:
            name = SKIPPED
        elif row.reason.startswith(OPEN_THOUGHT):
            name = "open_thought"  # the rule of that name, for the thoughts that answers open themselves
        yield Finding(row.origin, name, f"{row.field}: {row.reason}")
