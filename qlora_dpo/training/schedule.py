"""Which pairs each optimizer step takes, and how many steps there are: functions of the seed and the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from qlora_dpo.data.mixtures.sampling import Sampler


@dataclass(frozen=True)
class Schedule:
    """The order of the training pairs over `total_steps`; every epoch is its own permutation."""

    indices: Sequence[int]
    pairs_per_step: int
    total_steps: int
    seed: int
    sampler: Sampler | None = None
    """Draws the pairs of each epoch anew; `indices` are then those of the first."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every pair was seen once; the last one may be smaller."""
        return math.ceil(len(self.indices) / self.pairs_per_step)

    def step(self, number: int) -> list[int]:
        """Indices of the pairs of step `number`, counted from 1."""
        epoch, position = divmod(number - 1, self.steps_per_epoch)
        order = _order(len(self.indices), self.seed + 1_000_003 * epoch)
        taken = order[position * self.pairs_per_step : (position + 1) * self.pairs_per_step]
        indices = self.indices if self.sampler is None else self.sampler.epoch(epoch)
        return [indices[place] for place in taken]

    def epoch(self, number: int) -> float:
        """Epochs done after step `number`."""
        return number / self.steps_per_epoch


@lru_cache(maxsize=2)  # the steps of an epoch ask for it one after the other
def _order(count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def make_schedule(
    indices: Sequence[int], pairs_per_step: int, *, epochs: float, max_steps: int, seed: int,
    sampler: Sampler | None = None,
) -> Schedule:  # fmt: skip
    """A schedule of `max_steps` steps, or of `epochs` passes where `max_steps` is not above 0."""
    if sampler is not None:
        indices = sampler.epoch(0)
    steps = max_steps if max_steps > 0 else math.ceil(epochs * math.ceil(len(indices) / pairs_per_step))
    return Schedule(indices, pairs_per_step, steps, seed, sampler)
