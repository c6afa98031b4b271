"""Tokenized samples on disk, pairs or conversations: one Arrow file, memory-mapped, beside a report and the list of
refused rows.

A store is a folder that appears whole or not at all: it is written under another name and renamed. Its
manifest holds the hash of each file, so a damaged store is noticed and built again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.errors import StorageError

PAIRS_FILE = "pairs.arrow"
REFUSED_FILE = "refused_rows.jsonl"
MANIFEST_FILE = "manifest.json"
_IDS = "list[int]"
_LOGP = "float | None"


def id_columns(kind: type) -> list[str]:
    """The fields of a sample that are lists of numbers; they stand before all others."""
    return [field.name for field in fields(kind) if field.type == _IDS]


def _schema(kind: type) -> Any:
    import pyarrow as pa

    types = {
        _IDS: pa.list_(pa.int32()), "str | None": pa.string(), "str": pa.string(), "float": pa.float64(),
        _LOGP: pa.float64(),
    }  # fmt: skip
    return pa.schema([(field.name, types[str(field.type)]) for field in fields(kind)])


class SampleWriter:
    """Writes samples, dataclasses of one `kind`, and refused rows into a folder as they come; `content` hashes all ids
    and what else is a list of numbers, and the log-probs that samples bring along."""

    def __init__(self, folder: Path, kind: type) -> None:
        import pyarrow as pa

        self._schema = _schema(kind)
        self._id_columns = id_columns(kind)
        self._logp_columns = [field.name for field in fields(kind) if field.type == _LOGP]
        self._file = pa.OSFile(str(folder / PAIRS_FILE), "wb")
        self._arrow = pa.ipc.new_file(self._file, self._schema)
        self._refused = (folder / REFUSED_FILE).open("w", encoding="utf-8")
        self.content = hashlib.sha256()
        self.samples = 0

    def add_samples(self, samples: list[Any]) -> None:
        import pyarrow as pa

        for sample in samples:
            for ids in (getattr(sample, name) for name in self._id_columns):
                self.content.update(len(ids).to_bytes(8, "little") + array("i", ids).tobytes())
            logps = [logp for name in self._logp_columns if (logp := getattr(sample, name)) is not None]
            self.content.update(array("d", logps).tobytes())
        rows = {field.name: [getattr(sample, field.name) for sample in samples] for field in self._schema}
        columns = [pa.array(rows[field.name], type=field.type) for field in self._schema]
        self._arrow.write_batch(pa.record_batch(columns, schema=self._schema))
        self.samples += len(samples)

    def add_refused(self, rows: Iterable[RefusedRow]) -> None:
        for row in rows:
            self._refused.write(json.dumps(asdict(row)) + "\n")

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._arrow.close()
        self._file.close()
        self._refused.close()


@contextmanager
def new_store(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which becomes `folder` when the block ends, or vanishes when it fails.

    Raises:
        StorageError: when the disk refuses.
    """
    building: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        yield building
        _replace(building, folder)
    except OSError as error:
        raise StorageError(
            f"cannot write tokenized pairs to {folder.parent}: {error.strerror or error}; "
            "free some space there, or name another folder with --cache_dir or QLORA_DPO_CACHE."
        ) from error
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def _replace(building: Path, folder: Path) -> None:
    """Put a finished folder in its place, unless another process was faster."""
    if folder.exists() and read_manifest(folder) is None:
        damaged = Path(tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent))
        folder.rename(damaged / "store")
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        os.rename(building, folder)
    except OSError:
        if read_manifest(folder) is None:
            raise


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    files = {name: _hash_file(folder / name) for name in (PAIRS_FILE, REFUSED_FILE)}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files, **content}, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a store's manifest, None when there is no store or its files are not what was written."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        sound = all(_hash_file(folder / name) == digest for name, digest in manifest["files"].items())
        return manifest if sound and set(manifest["files"]) == {PAIRS_FILE, REFUSED_FILE} else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_refused(folder: Path) -> tuple[RefusedRow, ...]:
    with (folder / REFUSED_FILE).open(encoding="utf-8") as file:
        return tuple(RefusedRow(**json.loads(line)) for line in file)


def read_batches(folder: Path) -> list[Any]:
    """Memory-map the pairs as Arrow record batches."""
    import pyarrow as pa

    with pa.ipc.open_file(pa.memory_map(str(folder / PAIRS_FILE))) as reader:
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
