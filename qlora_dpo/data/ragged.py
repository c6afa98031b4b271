"""Rows of different lengths in one array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Row i is `values[offsets[i] : offsets[i + 1]]`; values are token ids or bytes of UTF-8."""

    offsets: NDArray[np.int64]
    values: NDArray[Any]

    @classmethod
    def view(cls, offsets: NDArray[Any], values: NDArray[Any]) -> Ragged:
        """Rows whose first offset may lie anywhere in `values`, without a copy of these."""
        start, end = int(offsets[0]), int(offsets[-1])
        return cls(offsets.astype(np.int64) - start, values[start:end])

    @classmethod
    def of(cls, rows: Iterable[NDArray[Any]]) -> Ragged:
        """Rows copied into one array."""
        parts = list(rows)
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(offsets, np.concatenate(parts) if parts else np.empty(0, np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self.values[start:end] for start, end in pairwise(self.offsets.tolist()))

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """Only these rows, in this order."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        borders = self.offsets.tolist()
        return Ragged.of(self.values[borders[row] : borders[row + 1]] for row in rows.tolist())

    def lengths(self) -> NDArray[np.int64]:
        """The length of every row."""
        return np.diff(self.offsets)

    def firsts(self) -> NDArray[np.int64]:
        """The first value of every row, -1 where it has none."""
        return self._at(self.offsets[:-1])

    def lasts(self) -> NDArray[np.int64]:
        """The last value of every row, -1 where it has none."""
        return self._at(self.offsets[1:] - 1)

    def count(self, value: int) -> NDArray[np.int64]:
        """How often `value` is in every row."""
        before = np.concatenate([[0], np.cumsum(self.values == value)])
        return np.asarray(before[self.offsets[1:]] - before[self.offsets[:-1]], np.int64)

    def hashes(self) -> NDArray[np.uint64]:
        """A 64-bit hash of every row."""
        digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in self)
        return np.frombuffer(digests, np.uint64)

    def _at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.full(len(self), -1, np.int64)
        filled = self.lengths() > 0
        found[filled] = self.values[places[filled]]
        return found
