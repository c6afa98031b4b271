"""The forms a row of preference data can have, an entry of `FORMATS` each: how to know it, how it becomes a
`PreferencePair`, and how a pair is written in it.

Columns that a format does not name are ignored, except `category` (text) and `confidence` (a number in
(0, 1]), which every format may carry.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any, Protocol

from qlora_dpo.data.messages import Values, kind, shown, text_of
from qlora_dpo.data.pair_formats import (
    alpaca,
    axolotl,
    hh_rlhf,
    messages,
    opendpo,
    orca,
    other_tools,
    plaintext,
    ranked,
    sharegpt,
    votes,
)
from qlora_dpo.data.preferences import ColumnNames, NoPlaceError, ParsedPair, PreferencePair, RowError
from qlora_dpo.errors import UsageError

__all__ = [
    "FORMATS",
    "ColumnNames",
    "Format",
    "ParsedPair",
    "all_columns",
    "check_format",
    "detect_format",
    "parse_row",
    "write_row",
]


class Format(Protocol):
    """One form of data: a module of `pair_formats`, or a `Layout`."""

    COLUMNS: str
    """In words."""
    EXAMPLE: dict[str, Any]
    """A row; with every column that `write` knows, where the form is written, too."""

    def matches(self, values: Values, names: ColumnNames, /) -> bool:
        """Tell by its columns whether a row has this form."""

    def parse(self, values: Values, names: ColumnNames, /) -> ParsedPair:
        """Read a row. Raises: RowError."""


class WrittenFormat(Format, Protocol):
    """A form that pairs are also written in."""

    def write(self, pair: PreferencePair, /) -> dict[str, Any]:
        """Make a row. Raises: RowError when the form has no place for something."""


def parse_row(name: str, values: Values, names: ColumnNames, origin: str) -> ParsedPair:
    """Read one row of a named format; its further pairs stand at `origin#2`, `origin#3`, ...

    Raises:
        RowError: when the row is no usable pair.
    """
    parsed = FORMATS[name].parse(values, names)
    category, confidence = _category(values), _confidence(values)

    def finished(pair: PreferencePair, origin: str) -> PreferencePair:
        _check_answers(pair, names)
        return replace(pair, category=category or pair.category, confidence=confidence, origin=origin)

    further = (finished(pair, f"{origin}#{number}") for number, pair in enumerate(parsed.more, 2))
    return replace(parsed, pair=finished(parsed.pair, origin), more=tuple(further))


def _check_answers(pair: PreferencePair, names: ColumnNames) -> None:
    for column, answer in ((names.chosen, pair.chosen), (names.rejected, pair.rejected)):
        if not answer.strip():
            raise RowError(column, "the answer is empty")
    if pair.chosen == pair.rejected:
        raise RowError(names.rejected, "the same answer as chosen")


def write_row(name: str, pair: PreferencePair) -> dict[str, Any]:
    """Make a row of a named format, from which `parse_row` gives the pair back.

    Raises:
        RowError: when the format has no place for something that the pair holds.
    """
    if pair.reference_logps is not None and name != "opendpo":
        raise NoPlaceError("reference_logps", "log-probs of a reference", "reference_logps")
    row = WRITTEN[name].write(pair)
    if pair.category is not None and "meta" not in row:
        row["category"] = pair.category
    if pair.confidence != 1.0:
        row["confidence"] = pair.confidence
    read = parse_row(name, row, ColumnNames(), pair.origin).pair
    if replace(read, prompt=read.messages) != replace(pair, prompt=pair.messages):
        raise RowError("row", f"would be read back as another pair from {name}")
    return row


def all_columns(name: str) -> dict[str, Any]:
    """A row with every column that `write_row` may give a row of a named format."""
    example = WRITTEN[name].EXAMPLE
    return {**example, **({} if "meta" in example else {"category": "math"}), "confidence": 0.5}


def detect_format(values: Values, names: ColumnNames | None = None) -> str:
    """Name the format of a row by its columns and their types.

    Raises:
        UsageError: when no format, or more than one, fits.
    """
    names = names or ColumnNames()
    fitting = [name for name, form in FORMATS.items() if form.matches(values, names)]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(f"{column} ({kind(value)})" for column, value in values.items()) or "none"
    known = "; ".join(f"{name}: {form.COLUMNS}" for name, form in FORMATS.items())
    raise UsageError(
        f"cannot tell the format of the data: its columns are {found}. Known formats: {known}. "
        "Name one with --dataset_format, or the columns with --prompt_key, --chosen_key and --rejected_key."
    )


def check_format(name: str, flag: str = "dataset_format") -> None:
    """Refuse a format name that is not in the table.

    Raises:
        UsageError: with the nearest known name.
    """
    table = FORMATS if flag == "dataset_format" else WRITTEN
    if name in table:
        return
    if name in FORMATS:
        raise UsageError(f"--{flag} {name}: this format is only read; pairs are written as {', '.join(WRITTEN)}.")
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    known = ", ".join(["auto", *FORMATS] if flag == "dataset_format" else WRITTEN)
    raise UsageError(f"--{flag} {name!r} is not known; choose {known}.{hint}")


def _category(values: Values) -> str | None:
    if values.get("category") is None:
        return None
    return text_of(values, "category") or None


def _confidence(values: Values) -> float:
    value = values.get("confidence")
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError("confidence", f"must be a number (it is {kind(value)})")
    # Written so that NaN, which compares false with everything, is refused too.
    if not 0 < value <= 1:
        raise RowError("confidence", f"must be above 0 and at most 1 (it is {shown(value)})")
    return float(value)


WRITTEN: dict[str, WrittenFormat] = {
    "hh-rlhf": hh_rlhf,
    "plaintext": plaintext,
    "messages": messages,
    "opendpo": opendpo,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
}

FORMATS: dict[str, Format] = {
    **WRITTEN,
    "orca": orca,
    "argilla": other_tools.ARGILLA,
    "axolotl": axolotl,
    "openai": other_tools.OPENAI,
    "swift": other_tools.SWIFT,
    "swift-query": other_tools.SWIFT_QUERY,
    "ultrafeedback": ranked.ULTRAFEEDBACK,
    "generations": ranked.GENERATIONS,
    "nectar": ranked.NECTAR,
    "nectar-best-worst": ranked.NECTAR_BEST_WORST,
    "helpsteer2": votes.HELPSTEER2,
    "helpsteer3": votes.HELPSTEER3,
    "pku-saferlhf": votes.PKU_SAFERLHF,
    "pku-saferlhf-safer": votes.PKU_SAFERLHF_SAFER,
    "arena": votes.ARENA,
    "shp": votes.SHP,
    "webgpt": votes.WEBGPT,
    "summarize": votes.SUMMARIZE,
}
"""All forms that are read; those that are not in `WRITTEN` are how other data sets and tools lay out their rows."""
