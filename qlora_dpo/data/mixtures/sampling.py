"""Which rows an epoch takes where groups of rows have rates: a function of seed and epoch, the same on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import floor

import numpy as np
from numpy.typing import NDArray

LEFT_OUT = -1  # the group of a row that no epoch takes


class Sampler:
    """Takes every row of a group floor(rate) times, and as many of them once more as the rate's fraction says.

    `groups` [rows] has the number of each row's group or `LEFT_OUT`, `rates` the rate of each group. All epochs have
    the same number of rows. What a group has left of a row is rounded up in some epochs and down in others, so that
    one row at rate 0.3 comes in about 3 epochs of 10.
    """

    def __init__(self, groups: NDArray[np.int64], rates: Sequence[float], seed: int) -> None:
        self._rows = len(groups)
        self._members = [np.flatnonzero(groups == group) for group in range(len(rates))]
        self._seed = seed
        exact = [Fraction(str(rate)) for rate in rates]  # 1.1 is eleven tenths, which no float is
        self._whole = [floor(rate) for rate in exact]
        shares = [len(members) * (rate % 1) for members, rate in zip(self._members, exact, strict=True)]
        self._sure = [floor(share) for share in shares]
        self._rests = [share % 1 for share in shares]
        self._rounded_up = floor(sum(self._rests, Fraction(1, 2)))

    def __len__(self) -> int:
        """Rows of an epoch, a row as often as it is taken."""
        taken = sum(len(members) * whole for members, whole in zip(self._members, self._whole, strict=True))
        return taken + sum(self._sure) + self._rounded_up

    def times(self, epoch: int) -> NDArray[np.int64]:
        """How often each row is taken in an epoch, counted from 0: [rows]."""
        times = np.zeros(self._rows, np.int64)
        once_more = self._once_more(epoch)
        for group, (members, whole) in enumerate(zip(self._members, self._whole, strict=True)):
            drawn = np.argsort(self._hashes(len(members), epoch, group), kind="stable")[: once_more[group]]
            times[members] = whole
            times[members[drawn]] += 1
        return times

    def epoch(self, number: int) -> list[int]:
        """The rows of an epoch in their order, a row as often as it is taken."""
        return _rows_of(self, number)

    def _once_more(self, epoch: int) -> list[int]:
        """How many rows of each group are taken once more; which groups are rounded up is drawn by their rests."""
        open_groups = [group for group, rest in enumerate(self._rests) if rest]
        # Efraimidis and Spirakis (2006): the smallest of log(u) / -weight are a weighted draw without replacement.
        uniform = (self._hashes(len(self._rests), epoch, "rest") + 0.5) / 2.0**64
        open_groups.sort(key=lambda group: -np.log(uniform[group]) / float(self._rests[group]))
        counts = list(self._sure)
        for group in open_groups[: self._rounded_up]:
            counts[group] += 1
        return counts

    def _hashes(self, count: int, *of: object) -> NDArray[np.uint64]:
        digest = hashlib.shake_256(repr((self._seed, *of)).encode()).digest(8 * count)
        return np.frombuffer(digest, "<u8")


@lru_cache(maxsize=2)  # the steps of an epoch ask for it one after the other
def _rows_of(sampler: Sampler, epoch: int) -> list[int]:
    times = sampler.times(epoch)
    rows: list[int] = np.repeat(np.arange(len(times)), times).tolist()
    return rows
