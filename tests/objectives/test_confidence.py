"""Confidence as label smoothing: cDPO's values and gradients by hand, and nothing where a pair is certain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_dpo.errors import UsageError
from qlora_dpo.objectives.objective import Objective, make_objective

BETA = 0.3
POLICY, REFERENCE = [-4.0, -9.0, -6.0, -3.0], [-5.0, -7.5, -5.5, -4.5]  # one token: chosen_0, rejected_0, chosen_1, ...
MARGINS = [BETA * (1.0 + 1.5), BETA * (-0.5 - 1.5)]
READERS = ["sigmoid", "sigmoid_norm", "robust", "exo_pair"]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def expected(name: str, margin: float, eps: float) -> float:
    right, wrong = log_sigmoid(margin), log_sigmoid(-margin)
    if name == "robust":
        return (-(1 - eps) * right + eps * wrong) / (1 - 2 * eps)
    if name == "exo_pair":
        share = 1 / (1 + math.exp(-margin))
        return share * (right - math.log(1 - eps)) + (1 - share) * (wrong - math.log(eps))
    return -(1 - eps) * right - eps * wrong


def make(name: str | list[str] = "sigmoid", **options: Any) -> Objective:
    return make_objective(name, beta=BETA, confidence_as="label_smoothing", **options)


def losses(objective: Objective, confidence: list[float] | None, policy: Tensor | None = None) -> Tensor:
    policy = torch.tensor(POLICY, dtype=torch.float64) if policy is None else policy
    reference = torch.tensor(REFERENCE, dtype=torch.float64)
    return objective(
        objective.statistics(policy, reference, [1, 1, 1, 1], confidence=confidence, mean_chosen_length=1.0)
    )


@pytest.mark.parametrize("name", READERS)
def test_the_smoothing_of_a_pair_is_one_minus_its_confidence(name: str) -> None:
    objective = make(name, label_smoothing=0.001)
    found = losses(objective, [0.9, 0.7]).tolist()
    assert found == pytest.approx([expected(name, m, e) for m, e in zip(MARGINS, (0.1, 0.3), strict=True)], rel=1e-12)


@pytest.mark.parametrize(("name", "most"), [("sigmoid", 0.5), ("exo_pair", 0.5), ("robust", 0.4)])
def test_the_smoothing_has_an_end(name: str, most: float) -> None:
    found = losses(make(name, label_smoothing=0.001), [0.5, 0.05]).tolist()
    assert found == pytest.approx([expected(name, margin, most) for margin in MARGINS], rel=1e-12)


def test_the_larger_smoothing_counts() -> None:
    found = losses(make(label_smoothing=0.2), [0.9, 0.7]).tolist()
    assert found == pytest.approx([expected("sigmoid", m, e) for m, e in zip(MARGINS, (0.2, 0.3), strict=True)])
    assert losses(make("robust", label_smoothing=0.45), [0.5, 1.0]).tolist() == pytest.approx(
        [expected("robust", margin, 0.45) for margin in MARGINS]
    )


@pytest.mark.parametrize("name", READERS)
def test_gradients(name: str) -> None:
    objective = make(name, label_smoothing=0.001)
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logps: losses(objective, [0.9, 0.6], logps), (policy,))


def test_the_gradient_of_cdpo_by_hand() -> None:
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    losses(make(), [0.9, 0.6], policy).sum().backward()
    # d/dm of -(1 - e) log s(m) - e log s(-m) is s(m) - (1 - e): zero where s(m) is the confidence
    slopes = [1 / (1 + math.exp(-m)) - c for m, c in zip(MARGINS, (0.9, 0.6), strict=True)]
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([BETA * s * sign for s in slopes for sign in (1, -1)])


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("smoothing", [0.001, 0.1])
def test_a_certain_pair_is_not_smoothed(name: str, smoothing: float) -> None:
    plain = losses(make_objective(name, beta=BETA, label_smoothing=smoothing), None)
    objective = make(name, label_smoothing=smoothing)
    torch.testing.assert_close(losses(objective, [1.0, 1.0]), plain, rtol=1e-14, atol=0)
    assert torch.equal(losses(objective, None), losses(objective, [1.0, 1.0]))
    # nor does it depend on the pair beside it
    assert torch.equal(losses(objective, [1.0, 0.6])[0], losses(objective, [1.0, 1.0])[0])


def test_a_weight_is_still_a_weight() -> None:
    plain, weighted = make_objective("sigmoid"), make_objective("sigmoid", confidence_as="weight")
    assert (
        losses(weighted, [0.9, 0.5]).tolist()
        == (losses(plain, None) * torch.tensor([0.9, 0.5], dtype=torch.float64)).tolist()
    )
    smoothed = make()
    pairs = smoothed.statistics(torch.zeros(4), torch.zeros(4), [1, 1, 1, 1], confidence=[0.9, 0.5])
    assert pairs.weights is None


def test_at_the_reference_the_loss_is_ln_2_whatever_the_confidence() -> None:
    objective = make(["sigmoid", "robust"])
    pairs = objective.statistics(torch.tensor(POLICY), torch.tensor(REFERENCE), [1, 1, 1, 1], confidence=[0.9, 0.5])
    assert objective.at_reference(pairs).tolist() == pytest.approx([2 * math.log(2)] * 2)


@pytest.mark.parametrize(
    ("name", "told"), [("ipo", "ipo"), ("aot", "aot"), (["sigmoid", "hinge"], "hinge"), ("sft", "sft")]
)
def test_losses_without_a_smoothing_of_one_pair_are_refused(name: str | list[str], told: str) -> None:
    with pytest.raises(UsageError, match=f"does not work with {told}: .* Use confidence_as weight, or losses among"):
        make(name)
    with pytest.raises(UsageError, match="confidence_as 'smoothing' is unknown"):
        make_objective(confidence_as="smoothing")


def test_the_chosen_answer_is_still_learned_beside_it() -> None:
    together = losses(make(["sigmoid", "sft"]), [0.9, 0.7])
    torch.testing.assert_close(together, losses(make(), [0.9, 0.7]) - torch.tensor([POLICY[0], POLICY[2]]).double())
