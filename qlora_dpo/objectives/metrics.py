"""What a run logs about its pairs, under TRL's names, as sums that add up over micro-batches."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_dpo.objectives.pairs import PairStatistics

CHOSEN_SHIFT = "displacement/chosen_per_token"
"""How much likelier than under the reference each token of the chosen answers is: the mean over pairs, in nats."""
REJECTED_SHIFT = "displacement/rejected_per_token"
"""The same of the rejected answers."""


def preference_metrics(
    losses: Tensor, pairs: PairStatistics, beta: float, *, has_reference: bool = True, averages_rewards: bool = False
) -> dict[str, Tensor]:
    """Return each logged value pair by pair, detached, `[B]` each; rewards are beta * log(pi / pi_ref).

    Without a reference they are beta * log pi, and per token where the loss averages them.
    """
    chosen_rewards = beta * (pairs.policy.chosen - pairs.reference.chosen)
    rejected_rewards = beta * (pairs.policy.rejected - pairs.reference.rejected)
    if averages_rewards:
        chosen_rewards, rejected_rewards = (
            chosen_rewards / pairs.chosen_lengths,
            rejected_rewards / pairs.rejected_lengths,
        )
    values = {
        "loss": losses,
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": chosen_rewards > rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": pairs.policy.chosen,
        "logps/rejected": pairs.policy.rejected,
        **(_shifts(pairs) if has_reference else {}),
        "lengths/chosen": pairs.chosen_lengths,
        "lengths/rejected": pairs.rejected_lengths,
    }
    return {name: value.detach() for name, value in values.items()}


def _shifts(pairs: PairStatistics) -> dict[str, Tensor]:
    return {CHOSEN_SHIFT: pairs.shift_per_token.chosen, REJECTED_SHIFT: pairs.shift_per_token.rejected}


@dataclass
class MetricSums:
    """Sums over pairs and their count: add micro-batches, merge processes, divide once at the end."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add the `[B]` values of one micro-batch; nothing leaves the device."""
        # float64, so that the logged mean hardly depends on how the step was cut
        sums = {name: value.sum(dtype=torch.float64) for name, value in values.items()}
        self.merge(MetricSums(sums, count=len(next(iter(values.values())))))

    def merge(self, other: "MetricSums") -> None:
        """Add the sums of another part of the same step.

        Raises: ValueError where the two do not measure the same things.
        """
        if self.count and other.count and self.sums.keys() != other.sums.keys():
            raise ValueError(f"cannot add {sorted(other.sums)} to {sorted(self.sums)}")
        if other.count:
            self.sums = {name: total + self.sums.get(name, 0) for name, total in other.sums.items()}
            self.count += other.count

    def mean(self) -> dict[str, float]:
        """Divide by the pairs counted, waiting for the device once; empty before the first pair."""
        if not self.count:
            return {}
        totals = torch.stack(list(self.sums.values())).tolist()
        return {name: total / self.count for name, total in zip(self.sums, totals, strict=True)}
