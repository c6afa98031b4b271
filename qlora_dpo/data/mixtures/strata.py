"""The groups that a mixture has rates for: what one of its sources has of one category."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from unicodedata import east_asian_width

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.mixtures.mixture import Mixture
from qlora_dpo.data.mixtures.sampling import LEFT_OUT, Sampler
from qlora_dpo.errors import DataError

_LONGEST = 32  # characters of a name in the table


@dataclass(frozen=True, slots=True)
class Share:
    """One group in an epoch: its rows, its rate, and how many times rows of it are taken."""

    category: str
    """A dash for rows without one."""
    source: str
    rows: int
    rate: float
    taken: int


class Strata:
    """Numbers the groups as their rows come, source by source, and remembers the group of every row."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._numbers: dict[tuple[int, str | None], int] = {}
        self._groups: list[int] = []

    def add(self, source: int, categories: Iterable[str | None]) -> None:
        """Take note of the next rows, which are of this source."""
        numbers = self._numbers
        self._groups += [numbers.setdefault((source, category), len(numbers)) for category in categories]

    def groups(self) -> NDArray[np.int64]:
        """The group of every row, `LEFT_OUT` where its rate is 0: [rows]."""
        rates = np.array(self._rates())
        groups = np.array(self._groups, np.int64)
        return np.where(rates[groups] > 0, groups, LEFT_OUT) if len(groups) else groups

    def sampler(self, groups: NDArray[np.int64], seed: int) -> Sampler:
        """Draws epochs of the rows that have a group.

        Raises:
            DataError: where the rates leave nothing.
        """
        sampler = Sampler(groups, self._rates(), seed)
        if not len(sampler):
            raise DataError(
                f"{self._mixture.path} leaves no row of {len(groups):,}: raise a sample_rate; these were found:\n"
                + "\n".join(table_of(self.shares(groups, sampler.times(0))))
            )
        return sampler

    def fingerprint(self) -> str:
        """Hash of the group of every row and of all rates."""
        parts = [(*group, rate) for group, rate in zip(self._numbers, self._rates(), strict=True)]
        return hashlib.sha256(repr(parts).encode() + np.array(self._groups, "<i8").tobytes()).hexdigest()

    def notes(self) -> list[str]:
        """Where what was found is not what the file expects."""
        counts = self._counts()
        return self._mixture.notes({group: int(counts[number]) for group, number in self._numbers.items()})

    def shares(self, groups: NDArray[np.int64], times: NDArray[np.int64]) -> list[Share]:
        """What an epoch that takes each row so many times has of every group."""
        there, rates = groups != LEFT_OUT, self._rates()
        rows = np.bincount(groups[there], minlength=len(rates))
        rows = np.where(np.array(rates) > 0, rows, self._counts())
        taken = np.bincount(np.repeat(groups[there], times[there]), minlength=len(rates))
        names = [source.name for source in self._mixture.sources]
        return [
            Share(category or "-", names[source], int(rows[number]), rates[number], int(taken[number]))
            for (source, category), number in self._numbers.items()
        ]

    def _counts(self) -> NDArray[np.int64]:
        return np.bincount(np.array(self._groups, np.int64), minlength=len(self._numbers))

    def _rates(self) -> list[float]:
        return [self._mixture.sources[source].rate_of(category) for source, category in self._numbers]


def table_of(shares: Sequence[Share]) -> list[str]:
    """The groups of an epoch as a table, a line each."""
    rows, taken = sum(share.rows for share in shares), sum(share.taken for share in shares)
    body = [
        (share.category, share.source, f"{share.rows:,}", f"{share.rate:g}", f"{share.taken:,}", _percent(share, taken))
        for share in shares
    ]
    head = ("category", "source", "rows", "rate", "per epoch", "share")
    return _aligned([head, *body, ("together", "", f"{rows:,}", "", f"{taken:,}", "")])


def sentences_of(shares: Sequence[Share]) -> list[str]:
    """The groups of an epoch, a phrase each."""
    taken = sum(share.taken for share in shares)
    return [
        f"{'no category' if share.category == '-' else share.category} of {share.source}: {share.rows:,} at rate "
        f"{share.rate:g}, {share.taken:,} per epoch ({_percent(share, taken)})"
        for share in shares
    ]


def _percent(share: Share, taken: int) -> str:
    return f"{share.taken / max(1, taken):.1%}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Columns side by side: two of names, to the left, and numbers, to the right."""
    rows = [tuple(cell if len(cell) <= _LONGEST else cell[: _LONGEST - 1] + "…" for cell in row) for row in rows]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        names, numbers = list(zip(row, gaps, strict=True))[:2], list(zip(row, gaps, strict=True))[2:]
        lines.append("  ".join([*(cell + gap for cell, gap in names), *(gap + cell for cell, gap in numbers)]).rstrip())
    return lines


def _width(text: str) -> int:
    """Places that a terminal gives a text: two for a Chinese character."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)
