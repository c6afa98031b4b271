"""`data mix`: what a mixture is made of, and the rows of one of its epochs as a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.config.data import MixOptions
from qlora_dpo.data.files.readers import file_kind
from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.files.writers import WRITERS, is_flat, row_writer
from qlora_dpo.data.formats import all_columns, write_row
from qlora_dpo.data.mixtures.mixture import Mixture, MixtureSource, read_mixture
from qlora_dpo.data.mixtures.strata import Strata, table_of
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import ColumnNames, PreferencePair, RefusedRow, RowError
from qlora_dpo.data.progress import with_progress
from qlora_dpo.data.report import DataReport
from qlora_dpo.errors import DataError, UsageError
from qlora_dpo.files.guard import check_output


def mix(options: MixOptions) -> None:
    """Print the table of a mixture and, where an output is named, write the rows of one epoch into it.

    Raises:
        DataError: when the mixture or its rows cannot be used.
        StorageError: when something cannot be read or written.
        UsageError: when an option cannot work.
    """
    if options.epoch < 0:
        raise UsageError(f"--epoch {options.epoch}: epochs are counted from 0.")
    mixture = read_mixture(options.file)
    if options.output is not None:
        _check_output(options.output, mixture)
    readers = [reader_of(source) for source in mixture.sources]
    strata = Strata(mixture)
    brings_logps = False
    for number, reader in enumerate(readers):
        found = _Found(reader)
        strata.add(number, found.categories(options.bad_rows))
        brings_logps |= found.brings_logps
    groups = strata.groups()
    times = strata.sampler(groups, options.seed).times(options.epoch)
    for note in strata.notes():
        print(f"note: {note}", file=sys.stderr)
    print("\n".join(table_of(strata.shares(groups, times))))
    if options.output is not None:
        form = "opendpo" if brings_logps else "messages"  # which holds all that pairs of any format hold
        with row_writer(options.output, all_columns(form) | {"origin": "pairs.jsonl:1"}) as add:
            for row in _rows(mixture, readers, times, form):
                add(row)
        print(f"{int(times.sum()):,} rows of epoch {options.epoch} (seed {options.seed}) are in {options.output}.")


def reader_of(source: MixtureSource) -> PairReader:
    """The pairs of one source of a mixture. Raises as `open_source`."""
    columns = {option.removesuffix("_key"): column for option, column in source.keys.items()}
    unread = sorted(columns.keys() - {column.name for column in fields(ColumnNames)})
    if unread:
        raise UsageError(
            f"{source.path}: {unread[0]}_key in the mixture is of conversations; this command mixes pairs."
        )
    opened = open_source(source.path, split=source.split, revision=source.revision)
    return PairReader(opened, source.format, ColumnNames(**columns))


class _Found:
    """What the first reading of a source finds out about it."""

    def __init__(self, reader: PairReader) -> None:
        self._reader = reader
        self.brings_logps = False

    def categories(self, bad_rows: str) -> list[str | None]:
        """The category of every pair. Raises: DataError for bad rows that are not to be skipped."""
        categories: list[str | None] = []
        refused: list[RefusedRow] = []
        for row in with_progress(self._reader, f"reading {self._reader.source.name}"):
            if isinstance(row, RefusedRow):
                refused.append(row)
            else:
                categories.append(row.category)
                self.brings_logps |= row.reference_logps is not None
        report = DataReport(
            self._reader.source.name,
            self._reader.dataset_format,
            rows_read=len(categories) + len(refused) - self._reader.further_pairs,
            pairs=len(categories),
            refused=tuple(refused),
            further_pairs=self._reader.further_pairs,
            unread_columns=self._reader.unread.names,
        )
        report.check(bad_rows)
        print("\n".join(report.summary()), file=sys.stderr)
        return categories


def _rows(mixture: Mixture, readers: list[PairReader], times: NDArray[np.int64], form: str) -> Iterator[dict[str, Any]]:
    """The rows of an epoch in the order of the sources; one that is taken twice is there twice."""
    left = iter(times.tolist())
    for source, reader in zip(mixture.sources, readers, strict=True):
        for pair in with_progress(reader, f"writing {source.name}"):
            if isinstance(pair, RefusedRow):
                continue
            count = next(left, None)
            if count is None:
                raise _changed(mixture)
            if count:
                yield from repeat(_row(pair, source, form), count)
    if next(left, None) is not None:
        raise _changed(mixture)


def _row(pair: PreferencePair, source: MixtureSource, form: str) -> dict[str, Any]:
    try:
        row = write_row(form, replace(pair, category=pair.category or source.name))
    except RowError as error:
        raise DataError(f"{pair.origin}: cannot be written as a row of {form}: {error}; repair it.") from error
    return row | {"origin": pair.origin}


def _changed(mixture: Mixture) -> DataError:
    return DataError(f"a source of {mixture.path} has changed while it was read; run the same command again.")


def _check_output(output: Path, mixture: Mixture) -> None:
    if file_kind(output) is None or is_flat(output):
        nested = ", ".join(suffix for suffix in WRITERS if not is_flat(Path(f"rows{suffix}")))
        raise UsageError(f"--output {output}: messages are written, so its name must end with one of {nested}.")
    check_output(output, inputs=[mixture.path, *(source.path for source in mixture.sources)])
