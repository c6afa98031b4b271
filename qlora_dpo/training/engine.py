"""One optimizer step's gradient: cut the samples into micro-batches, score, lose, accumulate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from qlora_dpo.data.packing import PackedBatch, Sample, batch_cost, cut, pack, token_cost
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import Scorer
from qlora_dpo.objectives.categories import Categories, CategorySums
from qlora_dpo.objectives.metrics import MetricSums
from qlora_dpo.objectives.objective import Objective
from qlora_dpo.objectives.pairs import PairStatistics
from qlora_dpo.objectives.supervised import SupervisedObjective
from qlora_dpo.reference.local import Reference
from qlora_dpo.training.methods import METHODS, Method
from qlora_dpo.training.parallel.ranks import ALONE, Ranks, deal

Sums = TypeVar("Sums", MetricSums, CategorySums)

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
    """Asked for pairs; `NoReference` where the objective has none."""
    device: torch.device
    max_tokens: int
    """Budget of a micro-batch: the preflight finds it, running out of memory halves it."""
    group: int
    """Pairs that a coupled loss compares with each other."""
    categories: Categories | None = None
    """By which the metrics are given besides."""
    ranks: Ranks = ALONE
    """The processes that compute each step together."""

    def accumulate_gradient(self, indices: Sequence[int], pause: Callable[[], None]) -> dict[str, float]:
        """Give the adapter the gradient of the step that these samples are; returns the step's metrics.

        `pause` is called before each micro-batch and may raise to stop there.
        """
        self.model.train()
        metrics = self._measure(indices, pause, learns=True)
        self.ranks.sum_gradients(trainable_parameters(self.model))
        return metrics

    def evaluate(self, indices: Sequence[int], pause: Callable[[], None]) -> dict[str, float]:
        """The same metrics without a gradient and without dropout."""
        self.model.eval()
        with torch.no_grad():
            return self._measure(indices, pause, learns=False)

    @property
    def method(self) -> Method:
        """How this objective reads a micro-batch."""
        return METHODS[type(self.objective)]

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens that these samples put through the model."""
        return sum(token_cost(self.pairs[index], self.scorer.kind) for index in indices)

    def shares(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The samples of a step that each process computes: whole groups, balanced by tokens."""
        if self.ranks.count == 1:
            return [indices]
        groups = self.groups(indices)
        dealt = deal([self.cost(group) for group in groups], self.ranks.count)
        return [[index for place in places for index in groups[place]] for places in dealt]

    def own(self, indices: Sequence[int]) -> Sequence[int]:
        """Those that this process computes."""
        return self.shares(indices)[self.ranks.rank]

    def micro_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """This process's samples of a step as the micro-batches that the budget allows."""
        return self._cut(self.own(indices))

    def all_micro_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """The micro-batches of all processes."""
        return [members for share in self.shares(indices) for members in self._cut(share)]

    def groups(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The parts that no budget cuts: single samples, or for a coupled loss the groups that it compares."""
        return [indices[start : start + self._indivisible] for start in range(0, len(indices), self._indivisible)]

    def cost(self, members: Sequence[int]) -> int:
        """Tokens that these samples put through the model as one micro-batch."""
        return batch_cost([self.pairs[index] for index in members], self.scorer.kind)

    @property
    def _indivisible(self) -> int:
        return self.group if isinstance(self.objective, Objective) and self.objective.couples_pairs else 1

    def _cut(self, indices: Sequence[int]) -> list[list[int]]:
        samples: list[Sample] = [self.pairs[index] for index in indices]
        bins = cut(samples, self.max_tokens, self.scorer.kind, self._indivisible)
        return [[indices[position] for position in members] for members in bins]

    def _measure(self, indices: Sequence[int], pause: Callable[[], None], learns: bool) -> dict[str, float]:
        """The metrics of these samples, of which each process computes its share; `learns` adds the gradient."""
        sums, by_category = MetricSums(), CategorySums(self.categories)
        for part in self.ranks.together(lambda: self._own_part(indices, pause, learns)):
            sums.merge(part[0])
            by_category.merge(part[1])
        return self._logged(sums, by_category)

    def _own_part(
        self, indices: Sequence[int], pause: Callable[[], None], learns: bool
    ) -> tuple[MetricSums, CategorySums]:
        sums, by_category = MetricSums(), CategorySums(self.categories)
        own = self.micro_batches(indices)
        padding = self._padding(indices, len(own)) if self.ranks.is_sharded else []
        for number, members in enumerate([*own, *padding], start=1):
            self._before_micro_batch(pause, is_last=number == len(own) + len(padding))
            learned = self.method.learn(self, members, indices)
            counts = number <= len(own)
            if learns:
                (learned.loss if counts else 0 * learned.loss).backward()
            if counts:
                sums.add(learned.values)
                by_category.add(learned.values, learned.owners)
        return (sums, by_category) if self.ranks.count == 1 else (_on_cpu(sums), _on_cpu(by_category))

    def _padding(self, indices: Sequence[int], count: int) -> list[list[int]]:
        """Micro-batches that count nothing, so that this process runs as many as any other."""
        most = max(len(self._cut(share)) for share in self.shares(indices))
        cheapest = min(self.groups(self.own(indices) or indices), key=self.cost, default=[])
        return [list(cheapest)] * (most - count)

    def _before_micro_batch(self, pause: Callable[[], None], is_last: bool) -> None:
        if not self.ranks.is_sharded:
            pause()
            return
        self.ranks.together(pause)  # in the same place, because no pass through the model can be left by one alone
        from qlora_dpo.training.parallel.fsdp import synchronize

        synchronize(self.model, is_last)

    def _logged(self, sums: MetricSums, by_category: CategorySums) -> dict[str, float]:
        counted = {} if self.method.counted is None else {self.method.counted: float(sums.count)}
        return sums.mean() | counted | by_category.mean()

    def statistics(self, members: list[int], step: Sequence[int]) -> PairStatistics:
        """What the objective reads about these pairs of a step."""
        assert isinstance(self.objective, Objective)
        pairs = [self.pairs[index] for index in members]
        batch = pack(pairs, self.scorer.kind).to(self.device)
        reference = self._reference_logps(members, batch)
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

    def _reference_logps(self, members: list[int], batch: PackedBatch) -> Tensor:
        """The reference's log-probs [N]; a pass of a sharded model that one process needs is run by all."""
        if self.ranks.is_sharded:
            is_missing = bool(self.reference.unknown(members))
            if any(self.ranks.gather(is_missing)) and not is_missing:
                self.reference.blank()(members, batch)
        return self.reference(members, batch)


def _on_cpu(part: Sums) -> Sums:
    """These sums as they can be sent to another process."""
    found = replace(part, sums={name: total.cpu() for name, total in part.sums.items()})
    if isinstance(found, CategorySums):
        found.categories = None  # every process has them
    return found
