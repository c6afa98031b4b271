"""`reference info`, `reference export`, `reference import`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qlora_dpo.config.reference import StoreExportOptions, StoreImportOptions, StoreInfoOptions
from qlora_dpo.errors import DataError, StorageError
from qlora_dpo.files.guard import check_output
from qlora_dpo.reference.store import Logps, ModelIdentity, ModelRows, ReferenceStore, StoredModel, why_no_logps

BATCH = 10_000  # rows
SAME = 1e-3  # nats per token: a larger difference is no rounding

_SCHEMA = pa.schema([("fingerprint", pa.string()), ("key", pa.binary(16)), ("logps", pa.list_(pa.float32()))])
_MODELS = b"qlora_dpo_reference_models"  # in the file's metadata: what the fingerprints stand for


def info(options: StoreInfoOptions) -> None:
    """Print what a store holds.

    Raises:
        StorageError: it cannot be read.
    """
    with ReferenceStore.open(options.store, read_only=True) as store:
        models = store.models()
        size = sum(file.stat().st_size for file in store_files(options.store))
    print(f"{options.store}: {size / 1e6:,.1f} MB, {count_models(models)}")
    for model in models:
        print("\n".join(["", *_lines(model)]))


def count_models(models: Sequence[StoredModel]) -> str:
    """`1 model`, `2 models`."""
    return f"{len(models)} model{'' if len(models) == 1 else 's'}"


def store_files(path: Path) -> list[Path]:
    """The files that a store consists of now."""
    return [file for file in (path, path.with_name(f"{path.name}-wal")) if file.exists()]


def _lines(model: StoredModel) -> list[str]:
    description = model.identity.description
    words = [f"  {name}: {value}" for name, value in sorted(description.items()) if value is not None]
    return [
        f"{model.identity.fingerprint}",
        f"  {model.rows:,} completions with {model.tokens:,} tokens, since {model.created}",
        *words,
    ]


def export(options: StoreExportOptions) -> None:
    """Write a store as Parquet.

    Raises:
        StorageError: it cannot be read, or the file not written.
        UsageError: the file is the store, or not an export.
    """
    check_output(options.output, inputs=store_files(options.store), is_own=_is_export)
    with ReferenceStore.open(options.store, read_only=True) as store:
        models = store.models()
        described = {model.identity.fingerprint: model.identity.description for model in models}
        schema = _SCHEMA.with_metadata({_MODELS: json.dumps(described)})
        with _replacing(options.output) as staged, pq.ParquetWriter(staged, schema) as writer:
            written = sum(_export_model(store.of(model.identity), writer, schema) for model in models)
    damaged = sum(model.rows for model in models) - written
    print(
        f"{written:,} completions of {count_models(models)} are in {options.output}"
        + (f"; {damaged:,} damaged ones were left out" if damaged else "")
    )


def _is_export(path: Path) -> bool:
    try:
        with pq.ParquetFile(path) as file:
            return _MODELS in (file.schema_arrow.metadata or {})
    except pa.ArrowInvalid:
        return False


def _export_model(rows: ModelRows, writer: pq.ParquetWriter, schema: pa.Schema) -> int:
    written = 0
    for batch in rows.batches(BATCH):
        columns = [[rows.model.fingerprint] * len(batch), list(batch), list(batch.values())]
        writer.write_table(pa.table(columns, schema=schema))
        written += len(batch)
    return written


@dataclass
class Merged:
    """How an import went, in rows."""

    new: int = 0
    same: int = 0
    conflicts: int = 0
    largest: float = 0.0
    """Difference per token among the conflicts."""

    def add(self, theirs: dict[bytes, Logps], ours: dict[bytes, Logps]) -> None:
        """Count a batch of rows to import, given those that are there already."""
        for key, values in theirs.items():
            own = ours.get(key)
            difference = 0.0 if own is None else _difference(values, own)
            self.new += own is None
            self.same += own is not None and difference <= SAME
            self.conflicts += difference > SAME
            self.largest = max(self.largest, difference if difference > SAME else 0.0)


def _difference(one: Logps, other: Logps) -> float:
    return float(np.abs(one - other).max()) if len(one) == len(other) else float("inf")


def import_rows(options: StoreImportOptions) -> None:
    """Add the rows of an exported file to a store; those that are there already stay.

    Raises:
        StorageError: the file cannot be read, or the store not written.
        DataError: it is no export, or a row of it holds no log-probs; what stood before that row has been added.
    """
    merged = Merged()
    with _exported(options.file) as (file, models), ReferenceStore.open(options.store) as store:
        rows = {fingerprint: store.of(identity) for fingerprint, identity in models.items()}
        for number, batch in enumerate(file.iter_batches(BATCH)):
            for fingerprint, theirs in _by_model(batch, options.file, number * BATCH).items():
                if fingerprint not in rows:
                    raise DataError(f"{options.file}: rows of the model {fingerprint[:16]}, which is not described.")
                merged.add(theirs, rows[fingerprint].get(list(theirs)))
                rows[fingerprint].put(theirs)
    print(f"{options.store}: {merged.new:,} completions were added, {merged.same:,} were there already.")
    if merged.conflicts:
        print(
            f"{merged.conflicts:,} are there with other values (by up to {merged.largest:.3g} per token) and stay as "
            "they are: one of the two files is wrong. `reference verify` computes some again."
        )


@contextmanager
def _exported(path: Path) -> Iterator[tuple[pq.ParquetFile, dict[str, ModelIdentity]]]:
    try:
        with pq.ParquetFile(path) as file:
            described = (file.schema_arrow.metadata or {}).get(_MODELS)
            if described is None or file.schema_arrow.names != _SCHEMA.names:
                raise DataError(
                    f"{path} was not written by `reference export`: its columns or its metadata are others."
                )
            yield file, {name: ModelIdentity(name, words) for name, words in json.loads(described).items()}
    except (OSError, pa.ArrowInvalid) as error:
        raise StorageError(f"{path} cannot be read as Parquet: {error}. Export it again.") from error


def _by_model(batch: pa.RecordBatch, path: Path, first: int) -> dict[str, dict[bytes, Logps]]:
    """The rows of a batch, by model.

    Raises:
        DataError: naming the first one that holds no log-probs.
    """
    found: dict[str, dict[bytes, Logps]] = {}
    names, keys = batch.column(0).to_pylist(), batch.column(1).to_pylist()
    for place, (name, key, values) in enumerate(zip(names, keys, batch.column(2), strict=True)):
        logps: Any = None if values.as_py() is None else values.values.to_numpy(zero_copy_only=False)
        reason = "nothing" if logps is None or key is None else why_no_logps(logps)
        if reason:
            raise DataError(f"{path}: row {first + place + 1:,} holds {reason}. Export it again from a sound store.")
        found.setdefault(name, {})[key] = logps
    return found


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when the block ends, and vanishes when it fails."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        staged.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}. Make room there.") from error
    finally:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
