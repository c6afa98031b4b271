"""From the rows of a source to a finished store of tokenized samples, in batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from qlora_dpo.data import pair_store
from qlora_dpo.data.columns import CONTENT, UnreadColumns
from qlora_dpo.data.control_tokens import tokenizer_content
from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.conversations import conversation_columns_read, detect_conversation_format, parse_conversation
from qlora_dpo.data.files.readers import Row, Rows, settled_format
from qlora_dpo.data.files.sources import Source
from qlora_dpo.data.formats import columns_read, detect_format, parse_row
from qlora_dpo.data.preferences import RefusedRow, RowError
from qlora_dpo.data.progress import with_progress
from qlora_dpo.data.tokenization import TokenizedPair
from qlora_dpo.data.unclear import LABELS
from qlora_dpo.data.values import Values

# Part of the cache key: raise it when the same file would give other ids or another report.
FORMAT_VERSION = 4

_BATCH = 1000  # rows

Parsed = tuple[tuple[Any, ...], tuple[str, ...]]


class SampleTokenizer(Protocol):
    """What makes samples of token ids out of parsed rows, a batch at a time, in order."""

    tokenizer: Any
    counts: Any

    @property
    def limits(self) -> tuple[int, ...]: ...
    def tokenize(self, parsed: list[Any], /) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class SampleKind:
    """What rows are read as: `detect` names the format of a row, `parse` gives all that it holds and its repairs."""

    unit: str
    sample: type
    detect: Callable[[Values, Any], str]
    parse: Callable[[str, Values, Any, str], Parsed]
    reads: Callable[[str, Any], frozenset[str]]
    """The columns that a format reads; with `auto` those that any would."""


def _parse_pair(name: str, values: Values, names: Any, origin: str) -> Parsed:
    parsed = parse_row(name, values, names, origin)
    return (parsed.pair, *parsed.more), parsed.repairs


def _parse_conversation(name: str, values: Values, names: Any, origin: str) -> Parsed:
    parsed = parse_conversation(name, values, names, origin)
    return (parsed.conversation,), parsed.repairs


PAIRS = SampleKind("pairs", TokenizedPair, detect_format, _parse_pair, columns_read)
CONVERSATIONS = SampleKind(
    "conversations",
    TokenizedConversation,
    detect_conversation_format,
    _parse_conversation,
    conversation_columns_read,
)


@dataclass(slots=True)
class TokenizingJob:
    """One source on its way into the cache; `names` says which columns hold what."""

    kind: SampleKind
    source: Source
    tokenizer: SampleTokenizer
    dataset_format: str
    names: Any
    max_samples: int | None
    repaired: Counter[str] = field(default_factory=Counter)
    further: int = 0
    """Samples that rows held besides their first."""
    unread: UnreadColumns = field(default_factory=UnreadColumns)

    def key(self) -> str:
        """Hash everything that the stored ids and report depend on."""
        parts = (
            FORMAT_VERSION,
            self.kind.unit,
            self.source.fingerprint(),
            self.dataset_format,
            *asdict(self.names).values(),
            self.tokenizer.limits,
            self.max_samples,
            tokenizer_content(self.tokenizer.tokenizer),
        )
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def build(self, folder: Path) -> None:
        """Read, check and tokenize the source into a store."""
        # Labels tell that rows are none of SFT.
        wanted = self.kind.reads(self.dataset_format, self.names) | CONTENT.keys() | set(LABELS)
        rows = self._with_format(islice(self.source.rows(wanted), self.max_samples))
        rows_read = 0
        with pair_store.new_store(folder) as building:
            with pair_store.SampleWriter(building, self.kind.sample) as writer:
                for batch in _batches(with_progress(rows, "tokenizing")):
                    rows_read += len(batch)
                    self._store(batch, writer)
            report = {
                "source": self.source.name,
                "dataset_format": self.dataset_format,
                "rows_read": rows_read,
                "further_pairs": self.further,
                "pairs": writer.samples,
                "unit": self.kind.unit,
                "repaired": self.repaired,
                "unread_columns": self.unread.names,
                **asdict(self.tokenizer.counts),
            }
            content = {"report": report, "fingerprint": writer.content.hexdigest()}
            pair_store.write_manifest(building, content)

    def _with_format(self, rows: Rows) -> Rows:
        if self.dataset_format != "auto":
            return rows
        found, rows = settled_format(rows, lambda values: self.kind.detect(values, self.names))
        self.dataset_format = found or self.dataset_format
        return rows

    def _store(self, batch: list[Row | RefusedRow], writer: pair_store.SampleWriter) -> None:
        parsed = [sample for row in batch for sample in self._parse(row)]
        tokenized = iter(self.tokenizer.tokenize([row for row in parsed if not isinstance(row, RefusedRow)]))
        results = [row if isinstance(row, RefusedRow) else next(tokenized) for row in parsed]
        writer.add_refused(row for row in results if isinstance(row, RefusedRow))
        writer.add_samples([sample for sample in results if not isinstance(sample, RefusedRow)])

    def _parse(self, row: Row | RefusedRow) -> tuple[Any, ...]:
        """What the row holds, or the row as refused."""
        if isinstance(row, RefusedRow):
            return (row,)
        self.unread.add(row.values, self.kind.reads(self.dataset_format, self.names), self.names.ignore_columns)
        try:
            parsed, repairs = self.kind.parse(self.dataset_format, row.values, self.names, row.origin)
        except RowError as error:
            return (error.refused(row.origin),)
        self.repaired.update(repairs)
        self.further += len(parsed) - 1
        return parsed


def _batches(rows: Rows) -> Iterator[list[Row | RefusedRow]]:
    while batch := list(islice(rows, _BATCH)):
        yield batch
