"""Logged values equal TRL's, and micro-batches add up to the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trl_values import trl_loss

from qlora_dpo.objectives.metrics import CHOSEN_SHIFT, REJECTED_SHIFT, MetricSums, preference_metrics
from qlora_dpo.objectives.objective import make_objective

LENGTHS = [5, 3, 2, 6, 4, 4]


def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    policy, reference = -3 * torch.rand(2, sum(LENGTHS), generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), reference


def metrics_of(policy: Tensor, reference: Tensor, lengths: list[int]) -> dict[str, Tensor]:
    objective = make_objective("sigmoid", beta=0.4)
    pairs = objective.statistics(policy, reference, lengths)
    return preference_metrics(objective(pairs), pairs, objective.beta)


def shift_by_hand(policy: Tensor, reference: Tensor, side: int) -> float:
    """Mean over the pairs of the mean over their chosen (0) or rejected (1) tokens; TRL logs only sums over tokens."""
    shifts = torch.split((policy - reference).detach(), LENGTHS)[side::2]
    return sum(float(shift.mean()) for shift in shifts) / len(shifts)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {"loss_type": "sigmoid_norm"}], ids=str)
def test_shift_of_the_answers_counts_every_token_once_whatever_the_loss(options: dict[str, Any]) -> None:
    policy, reference = rows()
    objective = make_objective(**options)
    pairs = objective.statistics(policy, reference, LENGTHS)
    values = preference_metrics(objective(pairs), pairs, objective.beta)
    for side, name in enumerate((CHOSEN_SHIFT, REJECTED_SHIFT)):
        assert values[name].mean().item() == pytest.approx(shift_by_hand(policy, reference, side))


def test_metrics_equal_trls() -> None:
    policy, reference = rows()
    sums = MetricSums()
    sums.add(metrics_of(policy, reference, LENGTHS))
    loss, expected = trl_loss(policy, reference, LENGTHS, loss_type=["sigmoid"], beta=0.4)
    means = sums.mean()
    assert means.pop("loss") == pytest.approx(loss.item())
    for side, name in enumerate((CHOSEN_SHIFT, REJECTED_SHIFT)):
        assert means.pop(name) == pytest.approx(shift_by_hand(policy, reference, side))
    assert (means.pop("lengths/chosen"), means.pop("lengths/rejected")) == (11 / 3, 13 / 3)
    assert means == {name: pytest.approx(expected[name]) for name in means}
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} < set(means)
    assert {"logps/chosen", "logps/rejected"} < set(means)


def test_metrics_are_detached_and_micro_batches_add_up() -> None:
    policy, reference = rows()
    whole = metrics_of(policy, reference, LENGTHS)
    assert not any(values.requires_grad for values in whole.values())
    expected, in_pieces, first = MetricSums(), MetricSums(), sum(LENGTHS[:2])
    expected.add(whole)
    in_pieces.add(metrics_of(policy[:first], reference[:first], LENGTHS[:2]))
    rest = MetricSums()
    rest.add(metrics_of(policy[first:], reference[first:], LENGTHS[2:]))
    in_pieces.merge(rest)
    in_pieces.merge(MetricSums())
    assert in_pieces.count == 3
    assert in_pieces.mean() == pytest.approx(expected.mean())


def test_at_the_reference_margins_are_zero_and_no_pair_counts_as_right() -> None:
    policy, _ = rows()
    values = metrics_of(policy, policy.detach(), LENGTHS)
    assert values["rewards/margins"].tolist() == [0.0] * 3
    assert values["rewards/accuracies"].tolist() == [False] * 3


def test_nothing_measured_has_no_mean() -> None:
    assert MetricSums().mean() == {}


def test_parts_that_measure_different_things_are_refused() -> None:
    sums = MetricSums()
    sums.add({"loss": torch.zeros(2)})
    with pytest.raises(ValueError, match="cannot add"):
        sums.add({"logps/chosen": torch.zeros(2)})
