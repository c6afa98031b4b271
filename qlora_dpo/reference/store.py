"""A file of per-token log-probs of frozen models, by model and completion: computed once, read by every later run.

It is one SQLite database. Many processes read it while one writes; a kill at any moment leaves a valid file without
the rows that were just being written, and so does a power cut, which may also take back the last few transactions. A
row that is missing or damaged is never read as a number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.reference.store_file import connect, storage_error

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 500  # keys of one query; SQLite takes 999 at least
LARGEST = 1e-3  # a log-prob is at most 0, and rounding may lift it this far

Logps = NDArray[np.float32]


def completion_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """The 16 bytes that stand for a prompt and a completion of it, whose tokens are the ones that are scored."""
    digest = hashlib.blake2b(array("q", (len(prompt_ids), len(completion_ids))).tobytes(), digest_size=16)
    digest.update(array("i", prompt_ids).tobytes())
    digest.update(array("i", completion_ids).tobytes())
    return digest.digest()


@dataclass(frozen=True)
class ModelIdentity:
    """What makes two models give the same log-probs, as a hash and in words."""

    fingerprint: str
    description: dict[str, Any]


@dataclass(frozen=True)
class StoredModel:
    """A model of a store: since when it is there, and how many rows and tokens it has."""

    identity: ModelIdentity
    created: str
    rows: int
    tokens: int


class ReferenceStore:
    """One SQLite file of per-token log-probs, by model fingerprint and completion."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> ReferenceStore:
        """Open a store; where there is none it is made, unless it is only to be read.

        Raises:
            StorageError: it is no store, damaged, cut short, of another version, or the disk refuses.
        """
        return cls(path, connect(path, read_only))

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> ReferenceStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, model: ModelIdentity) -> ModelRows:
        """The rows of one model, which becomes known to the store with its first row."""
        return ModelRows(self, model)

    def models(self) -> list[StoredModel]:
        """The models that have rows here, the oldest first."""
        with self.reading() as connection:
            found = connection.execute(
                "SELECT fingerprint, description, created, count(logps.model), coalesce(sum(tokens), 0) FROM models "
                "LEFT JOIN logps ON logps.model = models.id GROUP BY models.id ORDER BY models.id"
            ).fetchall()
            return [
                StoredModel(ModelIdentity(fingerprint, json.loads(description)), created, rows, tokens)
                for fingerprint, description, created, rows, tokens in found
            ]

    def problems(self) -> list[str]:
        """What is wrong with the file, a sentence each, after reading every byte of it."""
        try:
            with self.reading() as connection:
                found = [str(row[0]) for row in connection.execute("PRAGMA integrity_check")]
                problems = [f"SQLite: {line}" for line in found if line != "ok"]
                rows = connection.execute("SELECT key, tokens, crc, value FROM logps")
                damaged = sum(_read(*row) is None for row in rows)
        except StorageError as error:
            return [str(error)]
        return [*problems, *([f"{damaged} rows are damaged; they are computed again when asked for."] * bool(damaged))]

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, whose errors become sentences within this block."""
        try:
            yield self._connection
        except (sqlite3.Error, ValueError) as error:
            raise storage_error(self.path, error) from error

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection in a transaction, which is undone where the block fails."""
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


class ModelRows:
    """The rows of one model: the log-prob of each token of a completion."""

    def __init__(self, store: ReferenceStore, model: ModelIdentity) -> None:
        self.store, self.model = store, model
        self._number: int | None = None
        self._damaged: set[bytes] = set()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Logps]:
        """The rows that are there and whole; one that is damaged counts as missing and may be put again."""
        found: dict[bytes, Logps] = {}
        for key, *row in self._select("key, tokens, crc, value", keys):
            values = _read(key, *row)
            if values is not None:
                found[key] = values
            elif key not in self._damaged:
                self._damaged.add(key)
                logger.warning("warning: %s: the row %s is damaged and counts as missing.", self.store.path, key.hex())
        return found

    def has(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys that have a row, whole or not."""
        return {row[0] for row in self._select("key", keys)}

    def put(self, rows: Mapping[bytes, Logps]) -> None:
        """Add rows in one transaction; those that are there already stay as they are.

        Raises:
            ModelError: a value is no log-prob; nothing is added.
            StorageError: the disk refuses; nothing is added.
        """
        made = []
        for key, values in rows.items():
            reason = why_no_logps(values)
            if reason:
                raise ModelError(
                    f"log-probs for {self.store.path} are refused: {reason}. What computed them gives no usable "
                    "numbers; nothing was written."
                )
            value = np.ascontiguousarray(values, "<f4").tobytes()
            made.append((key, len(values), _crc(key, value), value))
        if not made:
            return
        with self.store.writing() as connection:
            number = self._registered(connection)
            again = [(number, key) for key, *_ in made if key in self._damaged]
            connection.executemany("DELETE FROM logps WHERE model = ? AND key = ?", again)
            connection.executemany(
                "INSERT INTO logps (model, key, tokens, crc, value) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                [(number, *row) for row in made],
            )
        self._number = number
        self._damaged.difference_update(rows)

    def discard(self, keys: Sequence[bytes]) -> None:
        """Remove these rows, where they are there.

        Raises:
            StorageError: the disk refuses.
        """
        with self.store.writing() as connection:
            number = self._find(connection)
            connection.executemany("DELETE FROM logps WHERE model = ? AND key = ?", [(number, key) for key in keys])

    def batches(self, size: int) -> Iterator[dict[bytes, Logps]]:
        """All whole rows, up to `size` at a time, in the order in which they were put."""
        last = -1
        while True:
            with self.store.reading() as connection:
                found = connection.execute(
                    "SELECT rowid, key, tokens, crc, value FROM logps WHERE model = ? AND rowid > ? "
                    "ORDER BY rowid LIMIT ?",
                    (self._find(connection), last, size),
                ).fetchall()
            if not found:
                return
            last = found[-1][0]
            read = ((row[1], _read(*row[1:])) for row in found)
            yield {key: values for key, values in read if values is not None}

    def __len__(self) -> int:
        with self.store.reading() as connection:
            query = "SELECT count(*) FROM logps WHERE model = ?"
            return int(connection.execute(query, (self._find(connection),)).fetchone()[0])

    def _select(self, columns: str, keys: Sequence[bytes]) -> Iterator[tuple[Any, ...]]:
        for start in range(0, len(keys), MOST_AT_ONCE):
            some = keys[start : start + MOST_AT_ONCE]
            marks = ", ".join("?" * len(some))
            with self.store.reading() as connection:
                query = f"SELECT {columns} FROM logps WHERE model = ? AND key IN ({marks})"
                found = connection.execute(query, (self._find(connection), *some)).fetchall()
            yield from found

    def _find(self, connection: sqlite3.Connection) -> int | None:
        """The number of the model, None where it has no rows."""
        if self._number is None:
            query = "SELECT id FROM models WHERE fingerprint = ?"
            row = connection.execute(query, (self.model.fingerprint,)).fetchone()
            self._number = None if row is None else int(row[0])
        return self._number

    def _registered(self, connection: sqlite3.Connection) -> int:
        """The number of the model, which is given to it here where it has none."""
        description = json.dumps(self.model.description, ensure_ascii=False, sort_keys=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        connection.execute(
            "INSERT INTO models (fingerprint, description, created) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (self.model.fingerprint, description, now),
        )
        query = "SELECT id FROM models WHERE fingerprint = ?"
        return int(connection.execute(query, (self.model.fingerprint,)).fetchone()[0])


def why_no_logps(values: Logps) -> str | None:
    """Why these cannot be the log-probs of a completion's tokens; None where they can."""
    checks: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("a completion without tokens", lambda: values.ndim == 1 and len(values) > 0),
        ("a log-prob that is not finite", lambda: bool(np.isfinite(values).all())),
        ("a log-prob above 0", lambda: bool(values.max() <= LARGEST)),
    )
    return next((reason for reason, holds in checks if not holds()), None)


def _read(key: bytes, tokens: int, crc: int, value: bytes) -> Logps | None:
    """The values of a row, None where they are not what was written."""
    if not isinstance(value, bytes) or len(value) != 4 * tokens or crc != _crc(key, value):
        return None
    return np.frombuffer(value, "<f4").astype(np.float32, copy=False)


def _crc(key: bytes, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key))
