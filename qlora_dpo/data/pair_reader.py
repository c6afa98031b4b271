"""Rows of a source as pairs of text, without a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from qlora_dpo.data.formats import ColumnNames, detect_format, parse_row
from qlora_dpo.data.preferences import PreferencePair, RefusedRow, RowError
from qlora_dpo.data.readers import Row, Rows
from qlora_dpo.data.sources import Source
from qlora_dpo.errors import UsageError

_ROWS_TO_DETECT_BY = 100


@dataclass(slots=True)
class PairReader:
    """Reads a source as often as it is iterated over; a format `auto` becomes the one that is found.

    Raises:
        UsageError: when no row shows its format.
        DataError, StorageError: when the source cannot be read.
    """

    source: Source
    dataset_format: str
    names: ColumnNames
    max_samples: int | None = None
    repaired: Counter[str] = field(default_factory=Counter)
    """How often each repair made a row usable, in the latest reading."""

    def __iter__(self) -> Iterator[PreferencePair | RefusedRow]:
        self.repaired.clear()
        return (self._parse(row) for row in self._with_format(islice(self.source.rows(), self.max_samples)))

    def _with_format(self, rows: Rows) -> Rows:
        """Settle the format by the first row that shows it; a row may be bad, so a few are tried."""
        if self.dataset_format != "auto":
            return rows
        head = list(islice(rows, _ROWS_TO_DETECT_BY))
        errors = []
        for values in (row.values for row in head if isinstance(row, Row)):
            try:
                self.dataset_format = detect_format(values, self.names)
                return chain(head, rows)
            except UsageError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return chain(head, rows)

    def _parse(self, row: Row | RefusedRow) -> PreferencePair | RefusedRow:
        if isinstance(row, RefusedRow):
            return row
        try:
            parsed = parse_row(self.dataset_format, row.values, self.names, row.origin)
        except RowError as error:
            return RefusedRow(row.origin, error.field, error.reason)
        self.repaired.update(parsed.repairs)
        return parsed.pair
