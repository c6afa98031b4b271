"""Rows of a source as pairs of text, without a tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from qlora_dpo.config.data import PairFileOptions
from qlora_dpo.data.columns import CONTENT, UnreadColumns
from qlora_dpo.data.files.readers import Rows, settled_format
from qlora_dpo.data.files.sources import Source, open_source, with_config
from qlora_dpo.data.formats import ColumnNames, check_format, columns_read, detect_format, parse_row
from qlora_dpo.data.preferences import PreferencePair, RefusedRow, RowError


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
    further_pairs: int = 0
    """Pairs that rows held besides their first, in the latest reading."""
    unread: UnreadColumns = field(default_factory=UnreadColumns)
    """The columns that no reading took."""

    def __iter__(self) -> Iterator[PreferencePair | RefusedRow]:
        self.repaired.clear()
        self.further_pairs = 0
        rows = self.source.rows(columns_read(self.dataset_format, self.names) | CONTENT.keys())
        for row in self._with_format(islice(rows, self.max_samples)):
            if isinstance(row, RefusedRow):
                yield row
                continue
            self.unread.add(row.values, columns_read(self.dataset_format, self.names), self.names.ignore_columns)
            try:
                parsed = parse_row(self.dataset_format, row.values, self.names, row.origin)
            except RowError as error:
                yield error.refused(row.origin)
                continue
            self.repaired.update(parsed.repairs)
            self.further_pairs += len(parsed.more)
            yield parsed.pair
            yield from parsed.more

    def _with_format(self, rows: Rows) -> Rows:
        if self.dataset_format != "auto":
            return rows
        found, rows = settled_format(rows, lambda values: detect_format(values, self.names))
        self.dataset_format = found or self.dataset_format
        return rows


def reader_of(pairs: PairFileOptions) -> PairReader:
    """The reader of the pairs that a command names.

    Raises:
        UsageError: the format is not known.
        StorageError: there is no such source.
    """
    if pairs.dataset_format != "auto":
        check_format(pairs.dataset_format)
    names = ColumnNames(
        pairs.prompt_key,
        pairs.chosen_key,
        pairs.rejected_key,
        pairs.category_key,
        pairs.confidence_key,
        tuple(pairs.ignore_columns),
    )
    source = open_source(with_config(pairs.file, pairs.dataset_config), split=pairs.split, revision=pairs.revision)
    return PairReader(source, pairs.dataset_format, names)
