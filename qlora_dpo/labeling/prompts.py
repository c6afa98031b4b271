"""Prompts to answer, out of rows that have a prompt or are pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from qlora_dpo.data.files.readers import Row
from qlora_dpo.data.files.sources import read_rows
from qlora_dpo.data.formats import detect_format, parse_row
from qlora_dpo.data.preferences import ColumnNames, Message, PreferencePair, RefusedRow, RowError
from qlora_dpo.data.prompts import prompt_of, read_prompt
from qlora_dpo.data.values import optional_text_of
from qlora_dpo.errors import UsageError
from qlora_dpo.labeling.refused import report_refused

_SHOWN_ROWS = 20


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt, what is known of its answer, and where it stands."""

    number: int
    """Of its row in the source, from 0."""
    prompt: str | tuple[Message, ...]
    category: str | None = None
    reference_answer: str | None = None
    origin: str = ""


def read_prompts(
    source: str, *, prompt_key: str, reference_answer_key: str, category_key: str
) -> Iterator[PromptRow | RefusedRow]:
    """Yield the prompts of a source: its column `prompt_key`, text or messages, or that of pairs of any known format.

    Raises:
        DataError, StorageError, UsageError: as `read_rows`; or the rows have no prompt.
    """
    for number, row in enumerate(read_rows(source)):
        if isinstance(row, RefusedRow):
            yield row
            continue
        try:
            reference = optional_text_of(row.values, reference_answer_key)
            category = optional_text_of(row.values, category_key) or None
            prompt, category_of_pair = _prompt(row, prompt_key, (reference_answer_key, category_key))
            yield PromptRow(
                number, prompt, category or category_of_pair, reference if reference.strip() else None, row.origin
            )
        except RowError as error:
            yield error.refused(row.origin)


def load_prompts(source: str, bad_rows: Literal["fail", "skip"], **keys: str) -> list[PromptRow]:
    """All prompts of a source; rows without one are counted on the terminal where they may be skipped.

    Raises:
        DataError: naming the bad rows, unless they are to be skipped; or there is no prompt.
    """
    prompts: list[PromptRow] = []
    refused: list[RefusedRow] = []
    for row in read_prompts(source, **keys):
        refused.append(row) if isinstance(row, RefusedRow) else prompts.append(row)
    report_refused(source, refused, len(prompts), bad_rows)
    return prompts


def _prompt(row: Row, prompt_key: str, read: Collection[str]) -> tuple[str | tuple[Message, ...], str | None]:
    """The prompt of a row, and the category where it is a pair that brings one."""
    if prompt_key not in row.values:
        pair = _pair(row, prompt_key)
        return prompt_of(pair), pair.category
    return read_prompt(row.values, prompt_key, read), None


def _pair(row: Row, prompt_key: str) -> PreferencePair:
    names = ColumnNames()
    try:
        form = detect_format(row.values, names)
    except UsageError:
        columns = ", ".join(row.values) or "none"
        raise RowError(prompt_key, f"missing, and the row is no pair; see --prompt_key (columns: {columns})") from None
    return parse_row(form, row.values, names, row.origin).pair
