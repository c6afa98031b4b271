"""The same metrics by category of the pairs, as sums that add up over micro-batches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "mean_token_accuracy")
"""What is logged of each category, as `loss/CATEGORY`, where the run measures it."""
COUNT = "count"
"""`count/CATEGORY`: the pairs that these are means over, or for SFT the tokens."""
MOST, OTHER, NONE = 20, "other", "none"

_LONGEST = 64  # characters of a name
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Categories:
    """Names that can be logged, and the number of the one that each pair belongs to."""

    names: tuple[str, ...]
    of: Sequence[int]


def make_categories(categories: Sequence[str | None], counted: Iterable[int]) -> Categories | None:
    """The categories of pairs, given pair by pair; None where the pairs at `counted` have one or none.

    The `MOST` with most of the counted pairs keep their names, all others are `other`; pairs without one are `none`.
    """
    frequent = Counter(categories[place] for place in counted).most_common()
    if len(frequent) < 2:
        return None
    names = [OTHER]
    numbers: dict[str | None, int] = {}
    for category, _ in frequent[:MOST]:
        numbers[category] = len(names)
        names.append(_loggable(category, names))
    return Categories(tuple(names), [numbers.get(category, 0) for category in categories])


def _loggable(category: str | None, taken: Sequence[str]) -> str:
    """A name that trackers take as the last part of a metric's name, and that no other category has."""
    name = NONE if category is None else _UNSAFE.sub("_", category).strip("_")[:_LONGEST] or "_"
    candidates = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 2)))
    return next(candidate for candidate in candidates if candidate not in taken)


@dataclass
class CategorySums:
    """Sums over the pairs of each category and their counts; without categories it does nothing."""

    categories: Categories | None
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, values: Mapping[str, Tensor], members: Sequence[int]) -> None:
        """Add the `[B]` values of these pairs; nothing leaves the device."""
        if self.categories is None:
            return
        numbers = [self.categories.of[member] for member in members]
        self.counts.update(numbers)
        shown = [name for name in SHOWN if name in values]
        every = torch.arange(len(self.categories.names))
        belongs = (every[:, None] == torch.tensor(numbers)).to(values[shown[0]].device)
        for name in shown:
            # where, not a product: what is not finite in one category stays there
            sums = torch.where(belongs, values[name].double(), 0.0).sum(dim=1)
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def merge(self, other: CategorySums) -> None:
        """Add the sums of another part of the same step."""
        for name, sums in other.sums.items():
            self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self.counts.update(other.counts)

    def mean(self) -> dict[str, float]:
        """The means of each category that came up, and its count; waits for the device once."""
        if self.categories is None or not self.counts:
            return {}
        totals = torch.stack(list(self.sums.values())).tolist()
        present = sorted(self.counts, key=lambda number: (number == 0, number))
        means = {
            f"{name}/{self.categories.names[number]}": row[number] / self.counts[number]
            for name, row in zip(self.sums, totals, strict=True)
            for number in present
        }
        counts = {f"{COUNT}/{self.categories.names[number]}": self.counts[number] for number in present}
        return means | counts
