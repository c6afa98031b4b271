"""Which rows are nearly the same, by MinHash over runs of tokens (or bytes).

The similarity of two rows is the share of their runs of `Grain.run` values that both have (Jaccard). Runs that a tenth
of the rows have come from a template or a system prompt and do not count. A row with few other runs is only ever the
same as an equal one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.ragged import Ragged

SIMILAR = 0.8
"""Rows at least this similar are near-duplicates. The estimate has a standard error of 0.05 there."""

Signatures = NDArray[np.uint32]  # [rows, _SLOTS]

_SLOTS, _BANDS = 64, 16
_PER_BAND = _SLOTS // _BANDS
_SEED = 42
_COMMON_SHARE, _COMMON_ROWS = 0.1, 20  # a run that more than both of these of the rows have is no sign of likeness
_ROWS_TO_COUNT_IN = 2000
_COMPARED_AT_ONCE = 50_000
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: spreads values over 64 bits
_HALF = np.uint64(32)


@dataclass(frozen=True, slots=True)
class Grain:
    """How many values a run has, and the fewest runs that say anything about a row."""

    run: int
    least: int


TOKENS, BYTES = Grain(5, 8), Grain(20, 32)


class Signer:
    """Makes the signatures of rows; `rows` that are spread over all of them show which runs are common."""

    def __init__(self, grain: Grain, rows: Sequence[Ragged]) -> None:
        self._grain = grain
        self._common = _common_runs(rows, grain)

    def sign(self, rows: Ragged, parts: int = 1) -> Signatures:
        """Signatures of rows that are `parts` consecutive ones each, in any order."""
        from rensa import RMinHash

        runs = _runs(rows, self._grain.run)
        if len(self._common):
            runs = _without(runs, self._common)
        starts = runs.offsets[::parts]
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(runs.values, starts, _SLOTS, _SEED)
        signatures = np.array(matrix.to_rows(), np.uint32).reshape(-1, _SLOTS)
        short = np.diff(starts) < self._grain.least
        if short.any():
            whole = Ragged(rows.offsets[::parts], rows.values).take(np.flatnonzero(short)).hashes()
            signatures[short] = _of_hashes(whole)
        return signatures


def earliest_similar(
    signatures: Sequence[Signatures], order: NDArray[np.int64], apart: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """For every row the row before it in `order` that it is a near-duplicate of, or -1.

    Rows are near-duplicates when they are in each of `signatures`, and have the same number in `apart`.
    """
    rows = len(order)
    place = np.empty(rows, np.int64)
    place[order] = np.arange(rows)
    found = np.full(rows, rows)  # as places in the order
    for band in range(_BANDS):
        keys = np.zeros(rows, np.uint64) if apart is None else apart.astype(np.uint64)
        for slot in range(band * _PER_BAND, (band + 1) * _PER_BAND):
            for columns in signatures:
                keys = keys * _FACTOR + columns[:, slot]
        members, firsts = _same_key(keys[order])
        members, firsts = order[members], order[firsts]
        alike = np.flatnonzero(_alike(signatures, members, firsts))
        np.minimum.at(found, members[alike], place[firsts[alike]])
    return np.where(found < rows, order[np.minimum(found, rows - 1)], -1)


def _same_key(keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places whose key stood before, and where it stood first."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[order[1:]] != keys[order[:-1]]
    firsts = order[np.maximum.accumulate(np.where(is_first, np.arange(len(keys)), 0))]
    return order[~is_first], firsts[~is_first]


def _alike(signatures: Sequence[Signatures], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
    alike = np.ones(len(left), bool)
    for start in range(0, len(left), _COMPARED_AT_ONCE):
        part = slice(start, start + _COMPARED_AT_ONCE)
        for columns in signatures:
            alike[part] &= (columns[left[part]] == columns[right[part]]).mean(axis=1) >= SIMILAR
    return alike


def _runs(rows: Ragged, size: int) -> Ragged:
    """A hash of each run of `size` values within a row."""
    count = len(rows.values) - size + 1
    if count <= 0:
        return Ragged(np.zeros(len(rows) + 1, np.int64), np.empty(0, np.uint64))
    hashes = np.zeros(count, np.uint64)
    for place in range(size):
        hashes *= _FACTOR
        hashes += rows.values[place : place + count].astype(np.uint64)
    hashes ^= hashes >> _HALF
    lengths = np.maximum(rows.lengths() - size + 1, 0)
    within = np.ones(count, bool)
    # The last size - 1 places of a row begin runs that reach into the next.
    for end in range(1, size):
        places = rows.offsets[1:][rows.lengths() >= end] - end
        within[places[places < count]] = False
    return Ragged(np.concatenate([[0], np.cumsum(lengths)]), hashes[within])


def _common_runs(rows: Sequence[Ragged], grain: Grain) -> NDArray[np.uint64]:
    """The runs that many rows have, sorted, from rows spread over all batches."""
    each = max(1, _ROWS_TO_COUNT_IN // max(1, len(rows)))
    chosen = [(batch, np.arange(0, len(batch), max(1, len(batch) // each))) for batch in rows]
    count = sum(len(places) for _, places in chosen)
    if count <= _COMMON_ROWS:  # so few have nothing in common; a run is more than these
        return np.empty(0, np.uint64)
    found: list[NDArray[np.uint64]] = []
    for batch, places in chosen:
        found += map(_distinct, _runs(batch.take(places), grain.run))
    runs = np.sort(np.concatenate(found))
    starts = np.flatnonzero(_is_first(runs))
    counts = np.diff(starts, append=len(runs))
    return np.asarray(runs[starts[counts > max(_COMMON_SHARE * count, _COMMON_ROWS)]], np.uint64)


def _distinct(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The different values, sorted. `np.unique` hashes them, which takes ten times as long for millions."""
    values = np.sort(values)
    return values[_is_first(values)]


def _is_first(ordered: NDArray[np.uint64]) -> NDArray[np.bool_]:
    return np.concatenate([np.ones(min(1, len(ordered)), bool), ordered[1:] != ordered[:-1]])


def _without(runs: Ragged, common: NDArray[np.uint64]) -> Ragged:
    places = np.minimum(np.searchsorted(common, runs.values), len(common) - 1)
    kept = common[places] != runs.values
    before = np.concatenate([[0], np.cumsum(kept)])
    return Ragged(before[runs.offsets], runs.values[kept])


def _of_hashes(hashes: NDArray[np.uint64]) -> Signatures:
    """Signatures that are the same for equal hashes and differ everywhere for others."""
    slots = np.arange(1, _SLOTS + 1, dtype=np.uint64) * _FACTOR
    return ((hashes[:, None] * _FACTOR + slots) >> _HALF).astype(np.uint32)
