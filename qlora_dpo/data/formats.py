"""The forms a row of preference data can have, an entry of `FORMATS` each: how to know it, how it becomes a
`PreferencePair`, and how a pair is written in it.

Every format may carry `category` (text), `confidence` (a number in (0, 1]) and the columns of `columns.CONTENT`.
All other columns that a format does not read are named to the user.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from functools import lru_cache
from typing import Any, Protocol

from qlora_dpo.data.columns import add_content, category_of, without, written_tools
from qlora_dpo.data.conversations import CONVERSATION_FORMATS, ConversationColumns, fitting_formats
from qlora_dpo.data.messages import is_silent, with_saved_messages
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
from qlora_dpo.data.pair_formats.layout import Layout
from qlora_dpo.data.preferences import ColumnNames, NoPlaceError, ParsedPair, PreferencePair, RowError
from qlora_dpo.data.unclear import LABELS, RATINGS, unclear
from qlora_dpo.data.values import Values, is_empty, kind, shown
from qlora_dpo.errors import UsageError

__all__ = [
    "FORMATS",
    "ColumnNames",
    "Format",
    "ParsedPair",
    "all_columns",
    "check_format",
    "columns_read",
    "detect_format",
    "parse_row",
    "write_row",
]


_OTHER_QUESTIONS = ("question", "instruction", "messages", "conversations", "context")


class Format(Protocol):
    """One form of data: a module of `pair_formats`, or a `Layout`."""

    COLUMNS: str
    """In words."""
    EXAMPLE: dict[str, Any]
    """A row; with every column that `write` knows, where the form is written, too."""

    def reads(self, names: ColumnNames, /) -> tuple[str, ...]:
        """The columns that `parse` reads. A column that no format reads, nor `columns.CONTENT`, stays in its file."""

    def matches(self, values: Values, names: ColumnNames, /) -> bool:
        """Tell by its columns whether a row has this form."""

    def parse(self, values: Values, names: ColumnNames, /) -> ParsedPair:
        """Read a row. Raises: RowError."""


class WrittenFormat(Format, Protocol):
    """A form that pairs are also written in."""

    def write(self, pair: PreferencePair, /) -> dict[str, Any]:
        """Make a row. Raises: RowError when the form has no place for something."""


@lru_cache
def columns_read(name: str, names: ColumnNames) -> frozenset[str]:
    """The columns that a format reads, by its name; with `auto` those that any format would.

    The columns of `columns.CONTENT` are read beside these, whatever the format.
    """
    forms = FORMATS.values() if name == "auto" else [FORMATS[name]]
    read = {column for form in forms for column in form.reads(names)}
    return frozenset(read | {names.category, names.confidence}) - {"", *names.ignore_columns}


def parse_row(name: str, values: Values, names: ColumnNames, origin: str) -> ParsedPair:
    """Read one row of a named format; its further pairs stand at `origin#2`, `origin#3`, ...

    Raises:
        RowError: when the row is no usable pair.
    """
    read = columns_read(name, names)
    values = with_saved_messages(_without_empty_prompt(without(values, names.ignore_columns), names), read)
    parsed = FORMATS[name].parse(values, names)
    category, confidence = category_of(values, names.category), _confidence(values, names.confidence)
    repairs: dict[str, None] = dict.fromkeys(parsed.repairs)

    def finished(pair: PreferencePair, origin: str) -> PreferencePair:
        _check_answers(pair, names)
        pair = replace(pair, category=category or pair.category, confidence=confidence, origin=origin)
        content = add_content(values, read, pair.messages)
        if content is None:
            return pair
        repairs.update(dict.fromkeys(content.repairs))
        return replace(
            pair,
            prompt=tuple(content.messages),
            tools=pair.tools or content.tools,
            chat_template_kwargs=pair.chat_template_kwargs or content.chat_template_kwargs,
        )

    first = finished(parsed.pair, origin)
    further = tuple(finished(pair, f"{origin}#{number}") for number, pair in enumerate(parsed.more, 2))
    return ParsedPair(first, tuple(repairs), further)


def _without_empty_prompt(values: Values, names: ColumnNames) -> Values:
    """The row without a prompt that is nothing, where another format's question is something."""
    is_nothing = names.prompt in values and is_empty(values[names.prompt])
    return without(values, (names.prompt,)) if is_nothing and any(map(values.get, _OTHER_QUESTIONS)) else values


def _check_answers(pair: PreferencePair, names: ColumnNames) -> None:
    for column, answer in ((names.chosen, pair.chosen_message), (names.rejected, pair.rejected_message)):
        if is_silent(answer):
            raise RowError(column, "the answer is empty")
    if pair.chosen_message == pair.rejected_message:
        raise RowError(names.rejected, "the same answer as chosen")


def write_row(name: str, pair: PreferencePair) -> dict[str, Any]:
    """Make a row of a named format, from which `parse_row` gives the pair back.

    Raises:
        RowError: when the format has no place for something that the pair holds.
    """
    if pair.reference_logps is not None and name != "opendpo":
        raise NoPlaceError("reference_logps", "log-probs of a reference", "reference_logps")
    row = WRITTEN[name].write(pair)
    if pair.tools:
        row["tools"] = written_tools(pair.tools)
    if pair.chat_template_kwargs:
        row["chat_template_kwargs"] = dict(pair.chat_template_kwargs)
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
    return {
        **example,
        **({} if "meta" in example else {"category": "math"}),
        "confidence": 0.5,
        "tools": [],
        "chat_template_kwargs": {},
    }


def detect_format(values: Values, names: ColumnNames | None = None) -> str:
    """Name the format of a row by its columns and their types.

    Raises:
        UsageError: when no format, or more than one, fits.
    """
    names = names or ColumnNames()
    values = _without_empty_prompt(without(values, names.ignore_columns), names)
    values = with_saved_messages(values, values)
    fitting = [name for name, form in FORMATS.items() if form.matches(values, names)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and names.chosen not in values and names.rejected not in values:
        _refuse_single_answers(values)
    forms = {
        name: (form.COLUMNS, form.needs if isinstance(form, Layout) else form.reads(names))
        for name, form in FORMATS.items()
        if not (isinstance(form, Layout) and form.is_variant)
    }
    flags = {names.prompt: "--prompt_key", names.chosen: "--chosen_key", names.rejected: "--rejected_key"}
    raise unclear(values, forms, fitting, flags)


def _refuse_single_answers(values: Values) -> None:
    """Say of rows with one answer each what to do with them.

    Raises:
        UsageError: when the row is one.
    """
    names = fitting_formats(values, ConversationColumns())
    if names and any(column in values for column in (*LABELS, *RATINGS)):
        raise UsageError(
            f"each row is one answer with a label or a rating (its columns are {', '.join(values)}), and DPO needs "
            "pairs of answers to one prompt. `data pair FILE --output pairs.jsonl` makes pairs of the rows that share "
            "a prompt."
        )
    if names:
        raise UsageError(
            f"each row is a conversation with one answer ({names[0]}: {CONVERSATION_FORMATS[names[0]].columns}), and "
            "DPO needs two answers to a prompt. Train on it with --objective sft, or let `generate` and a labeller "
            "make pairs of the prompts."
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


def _confidence(values: Values, column: str) -> float:
    value = values.get(column)
    if value is None or value == "":
        return 1.0
    if isinstance(value, str):  # CSV knows only text
        value = _number(value)
    way_out = "; --confidence_key names another column, or '' for none"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RowError(column, f"must be a number (it is {kind(value)}{way_out})")
    # Written so that NaN, which compares false with everything, is refused too.
    if not 0 < value <= 1:
        raise RowError(column, f"must be above 0 and at most 1 (it is {shown(value)}{way_out})")
    return float(value)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


WRITTEN: dict[str, WrittenFormat] = {
    "plaintext": plaintext,
    "hh-rlhf": hh_rlhf,
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
    "kaggle-arena": votes.KAGGLE_ARENA,
    "shp": votes.SHP,
    "webgpt": votes.WEBGPT,
    "summarize": votes.SUMMARIZE,
}
"""All forms that are read; those that are not in `WRITTEN` are how other data sets and tools lay out their rows."""
