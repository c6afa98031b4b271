"""From the rows of a source to a finished store of tokenized pairs, in batches."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path

from qlora_dpo.data import formats, pair_store
from qlora_dpo.data.control_tokens import tokenizer_content
from qlora_dpo.data.formats import ColumnNames
from qlora_dpo.data.preferences import PreferencePair, RefusedRow, RowError
from qlora_dpo.data.readers import Row, Rows
from qlora_dpo.data.sources import Source
from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair
from qlora_dpo.errors import UsageError

# Part of the cache key: raise it when the same file would give other ids or another report.
FORMAT_VERSION = 1

_BATCH = 1000  # rows
_ROWS_TO_DETECT_BY = 100


@dataclass(slots=True)
class TokenizingJob:
    """One source on its way into the cache."""

    source: Source
    tokenizer: PairTokenizer
    dataset_format: str
    names: ColumnNames
    max_samples: int | None
    repaired: Counter[str] = field(default_factory=Counter)

    def key(self) -> str:
        """Hash everything that the stored ids and report depend on."""
        parts = (
            FORMAT_VERSION,
            self.source.fingerprint(),
            self.dataset_format,
            *asdict(self.names).values(),
            self.tokenizer.max_length,
            self.tokenizer.max_prompt_length,
            self.max_samples,
            tokenizer_content(self.tokenizer.tokenizer),
        )
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def build(self, folder: Path) -> None:
        """Read, check and tokenize the source into a store."""
        rows = self._with_format(islice(self.source.rows(), self.max_samples))
        rows_read = 0
        with pair_store.new_store(folder) as building:
            with pair_store.PairWriter(building) as writer:
                for batch in _batches(_with_progress(rows)):
                    rows_read += len(batch)
                    self._store(batch, writer)
            report = {
                "source": self.source.name,
                "dataset_format": self.dataset_format,
                "rows_read": rows_read,
                "pairs": writer.pairs,
                "repaired": self.repaired,
                **asdict(self.tokenizer.counts),
            }
            content = {"report": report, "fingerprint": writer.content.hexdigest()}
            pair_store.write_manifest(building, content)

    def _with_format(self, rows: Rows) -> Rows:
        """Settle the format by the first row that shows it; a row may be bad, so a few are tried."""
        if self.dataset_format != "auto":
            return rows
        head = list(islice(rows, _ROWS_TO_DETECT_BY))
        errors = []
        for values in (row.values for row in head if isinstance(row, Row)):
            try:
                self.dataset_format = formats.detect_format(values, self.names)
                return chain(head, rows)
            except UsageError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return chain(head, rows)

    def _store(self, batch: list[Row | RefusedRow], writer: pair_store.PairWriter) -> None:
        parsed = [self._parse(row) for row in batch]
        usable = [row for row in parsed if isinstance(row, PreferencePair)]
        tokenized = iter(self.tokenizer.tokenize(usable))
        results = [next(tokenized) if isinstance(row, PreferencePair) else row for row in parsed]
        writer.add_refused(row for row in results if isinstance(row, RefusedRow))
        writer.add_pairs([pair for pair in results if isinstance(pair, TokenizedPair)])

    def _parse(self, row: Row | RefusedRow) -> PreferencePair | RefusedRow:
        if isinstance(row, RefusedRow):
            return row
        try:
            parsed = formats.parse_row(self.dataset_format, row.values, self.names, row.origin)
        except RowError as error:
            return RefusedRow(row.origin, error.field, error.reason)
        self.repaired.update(parsed.repairs)
        return parsed.pair


def _batches(rows: Rows) -> Iterator[list[Row | RefusedRow]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch


def _with_progress(rows: Rows) -> Rows:
    """Show a bar on a terminal, and now and then a line in a log when it takes long."""
    from tqdm import tqdm

    seconds = 0.2 if sys.stderr.isatty() else 30
    return iter(tqdm(rows, desc="tokenizing", unit=" rows", delay=seconds, mininterval=seconds, leave=False))
