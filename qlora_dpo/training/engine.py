"""One optimizer step's gradient: cut the pairs into micro-batches, score, lose, accumulate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlora_dpo.data.packing import batch_cost, cut, pack, token_cost
from qlora_dpo.data.tokenization import TokenizedPair
from qlora_dpo.models.lora import reference_active
from qlora_dpo.models.scoring import Scorer
from qlora_dpo.objectives.metrics import MetricSums, preference_metrics
from qlora_dpo.objectives.objective import Objective
from qlora_dpo.objectives.pairs import PairStatistics
from qlora_dpo.reference.local import ReferenceLogps

DEFAULT_MAX_TOKENS = 2048  # of a micro-batch where nothing was measured


@dataclass
class Engine:
    """Computes losses and gradients of any set of pairs; the result does not depend on how they are cut."""

    model: Any
    scorer: Scorer
    objective: Objective
    """The displacement guard may replace it between two steps."""
    pairs: Sequence[TokenizedPair]
    reference: ReferenceLogps
    device: torch.device
    max_tokens: int
    """Budget of a micro-batch: the preflight finds it, running out of memory halves it."""
    group: int
    """Pairs that a coupled loss compares with each other."""

    def accumulate_gradient(self, indices: Sequence[int], pause: Callable[[], None]) -> dict[str, float]:
        """Add the gradient of the mean loss over these pairs to the adapter; returns the step's metrics.

        `pause` is called before each micro-batch and may raise to stop there.
        """
        self.model.train()
        sums = MetricSums()
        for members in self.micro_batches(indices):
            pause()
            pairs = self._statistics(members, indices)
            losses = self.objective(pairs)
            (losses.sum() / len(indices)).backward()
            sums.add(preference_metrics(losses, pairs, self.objective.beta))
        return sums.mean()

    def evaluate(self, indices: Sequence[int], pause: Callable[[], None]) -> dict[str, float]:
        """The same metrics without a gradient and without dropout."""
        self.model.eval()
        sums = MetricSums()
        with torch.no_grad():
            for members in self.micro_batches(indices):
                pause()
                pairs = self._statistics(members, indices)
                sums.add(preference_metrics(self.objective(pairs), pairs, self.objective.beta))
        return sums.mean()

    def tokens(self, indices: Sequence[int]) -> int:
        """Tokens that these pairs put through the model."""
        return sum(token_cost(self.pairs[index], self.scorer.kind) for index in indices)

    def micro_batches(self, indices: Sequence[int]) -> list[list[int]]:
        """The pairs of a step as the micro-batches that the budget allows."""
        pairs = [self.pairs[index] for index in indices]
        bins = cut(pairs, self.max_tokens, self.scorer.kind, self._indivisible)
        return [[indices[position] for position in members] for members in bins]

    def groups(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The parts that no budget cuts: single pairs, or for a coupled loss the groups that it compares."""
        return [indices[start : start + self._indivisible] for start in range(0, len(indices), self._indivisible)]

    def cost(self, members: Sequence[int]) -> int:
        """Tokens that these pairs put through the model as one micro-batch."""
        return batch_cost([self.pairs[index] for index in members], self.scorer.kind)

    @property
    def _indivisible(self) -> int:
        return self.group if self.objective.couples_pairs else 1

    def _statistics(self, members: list[int], step: Sequence[int]) -> PairStatistics:
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


def local_reference(model: Any, scorer: Scorer) -> ReferenceLogps:
    """The reference that lives in the policy's own base."""

    def score(batch: Any) -> torch.Tensor:
        with torch.no_grad(), reference_active(model):
            return scorer.per_token_logps(model, batch)

    return ReferenceLogps(score)
