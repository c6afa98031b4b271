"""One optimizer step's gradient: cut the samples into micro-batches, score, lose, accumulate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dpo.data.packing import Sample, batch_cost, cut, pack, token_cost
from qlora_dpo.models.scoring import Scorer
from qlora_dpo.objectives.categories import Categories, CategorySums
from qlora_dpo.objectives.metrics import MetricSums
from qlora_dpo.objectives.objective import Objective
from qlora_dpo.objectives.pairs import PairStatistics
from qlora_dpo.objectives.supervised import SupervisedObjective
from qlora_dpo.reference.local import Reference
from qlora_dpo.training.methods import METHODS, Method

DEFAULT_MAX_TOKENS = 2048  # of a micro-batch where nothing was measured


@dataclass
class Engine:
    """Computes losses and gradients of any set of samples; the result does not depend on how they are cut."""

    model: Any
    scorer: Scorer
    objective: Objective | SupervisedObjective
    """The displacement guard may replace it between two steps."""
    pairs: Sequence[Any]
    """Preference pairs, or for SFT conversations."""
    reference: Reference
    """Asked only by a method that has one."""
    device: torch.device
    max_tokens: int
    """Budget of a micro-batch: the preflight finds it, running out of memory halves it."""
    group: int
    """Pairs that a coupled loss compares with each other."""
    categories: Categories | None = None
    """By which the metrics are given besides."""

    def accumulate_gradient(self, indices: Sequence[int], pause: Callable[[], None]) -> dict[str, float]:
        """Add the gradient of the step that these samples are to the adapter; returns the step's metrics.

        `pause` is called before each micro-batch and may raise to stop there.
        """
        self.model.train()
        sums, by_category = MetricSums(), CategorySums(self.categories)
        for members in self.micro_batches(indices):
            pause()
            learned = self.method.learn(self, members, indices)
            learned.loss.backward()
            sums.add(learned.values)
            by_category.add(learned.values, learned.owners)
        return self._logged(sums, by_category)

    def evaluate(self, indices: Sequence[int], pause: Callable[[], None]) -> dict[str, float]:
        """The same metrics without a gradient and without dropout."""
        self.model.eval()
        sums, by_category = MetricSums(), CategorySums(self.categories)
        with torch.no_grad():
            for members in self.micro_batches(indices):
                pause()
                learned = self.method.learn(self, members, indices)
                sums.add(learned.values)
                by_category.add(learned.values, learned.owners)
        return self._logged(sums, by_category)

    @property
    def method(self) -> Method:
        """How this objective reads a micro-batch."""
        return METHODS[type(self.objective)]

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens that these samples put through the model."""
        return sum(token_cost(self.pairs[index], self.scorer.kind) for index in indices)

    def micro_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """The samples of a step as the micro-batches that the budget allows."""
        samples: list[Sample] = [self.pairs[index] for index in indices]
        bins = cut(samples, self.max_tokens, self.scorer.kind, self._indivisible)
        return [[indices[position] for position in members] for members in bins]

    def groups(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The parts that no budget cuts: single samples, or for a coupled loss the groups that it compares."""
        return [indices[start : start + self._indivisible] for start in range(0, len(indices), self._indivisible)]

    def cost(self, members: Sequence[int]) -> int:
        """Tokens that these samples put through the model as one micro-batch."""
        return batch_cost([self.pairs[index] for index in members], self.scorer.kind)

    @property
    def _indivisible(self) -> int:
        return self.group if isinstance(self.objective, Objective) and self.objective.couples_pairs else 1

    def _logged(self, sums: MetricSums, by_category: CategorySums) -> dict[str, float]:
        counted = {} if self.method.counted is None else {self.method.counted: float(sums.count)}
        return sums.mean() | counted | by_category.mean()

    def statistics(self, members: list[int], step: Sequence[int]) -> PairStatistics:
        """What the objective reads about these pairs of a step."""
        assert isinstance(self.objective, Objective)
        pairs = [self.pairs[index] for index in members]
        batch = pack(pairs, self.scorer.kind).to(self.device)
        reference = self.reference(members, batch)
        policy, squares = self.scorer.per_token_logps_and_squares(
            self.model, batch, with_squares=self.objective.use_weighting
        )
        confidence = [pair.confidence for pair in pairs]
        mean_chosen_length = None
        if self.objective.needs_token_normalizer:
            mean_chosen_length = sum(len(self.pairs[index].chosen_ids) for index in step) / len(step)
        return self.objective.statistics(
            policy,
            reference,
            batch.completion_lengths,
            per_token_log_squares=squares,
            confidence=confidence if min(confidence) < 1 else None,
            mean_chosen_length=mean_chosen_length,
        )
