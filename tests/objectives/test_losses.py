"""Every loss equals TRL's value and the published formula, and no loss depends on how a step was cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_values import trl_loss

from qlora_dpo.objectives.losses import LOSSES
from qlora_dpo.objectives.objective import Objective, make_objective
from qlora_dpo.objectives.pairs import PairStatistics, pair_logps

LENGTHS = [5, 3, 2, 6, 4, 4, 1, 7]  # chosen_0, rejected_0, chosen_1, ...
BETA, SMOOTHING, TAU = 0.3, 0.1, 0.05
SMOOTHED = {name for name, loss in LOSSES.items() if loss.smooths_labels}
COUPLED = {name for name, loss in LOSSES.items() if loss.couples_pairs}
OF_DPO = [name for name, loss in LOSSES.items() if not loss.reference_free]
# Label smoothing that the loss itself reads in TRL too; TRL's sigmoid and sigmoid_norm ignore it
SMOOTHED_IN_TRL = SMOOTHED - {"sigmoid", "sigmoid_norm"}


def flat_logps(seed: int, dtype: torch.dtype = torch.float64, lengths: list[int] = LENGTHS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(sum(lengths), generator=generator, dtype=torch.float64).to(dtype)


def options_for(name: str) -> dict[str, Any]:
    smoothing = {"label_smoothing": SMOOTHING} if name in SMOOTHED_IN_TRL else {}
    return {"loss_type": [name], "beta": BETA} | smoothing


def mean_chosen(lengths: list[int]) -> float:
    return sum(lengths[0::2]) / (len(lengths) / 2)


def statistics(objective: Objective, policy: Tensor, reference: Tensor, **more: Any) -> PairStatistics:
    return objective.statistics(policy, reference, LENGTHS, mean_chosen_length=mean_chosen(LENGTHS), **more)


def step_loss(options: dict[str, Any], policy: Tensor, reference: Tensor, **more: Any) -> Tensor:
    objective = make_objective(**options)
    return objective(statistics(objective, policy, reference, **more)).mean()


def assert_equals_trl(options: dict[str, Any], dtype: torch.dtype = torch.float64, rtol: float = 1e-10) -> None:
    policy, reference = flat_logps(1, dtype).requires_grad_(), flat_logps(2, dtype)
    log_squares = -flat_logps(3, dtype).abs() if options.get("use_weighting") else None
    ours = step_loss(options, policy, reference, per_token_log_squares=log_squares)
    theirs, _ = trl_loss(policy, reference, LENGTHS, log_squares=log_squares, **options)
    assert ours.item() == pytest.approx(theirs.item(), rel=rtol)
    (our_gradient,) = torch.autograd.grad(ours, policy)
    (their_gradient,) = torch.autograd.grad(theirs, policy)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=rtol * 10, atol=rtol)


@pytest.mark.parametrize("name", OF_DPO)
def test_loss_and_gradient_equal_trls(name: str) -> None:
    assert_equals_trl(options_for(name))


def test_the_table_holds_every_loss_that_trl_has() -> None:
    from trl import DPOConfig

    documented = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"`'{name}'`" in documented for name in OF_DPO)
    assert documented.count("`'") == len(OF_DPO)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.supports_f_divergence])
def test_f_divergences_equal_trls(name: str, divergence: str) -> None:
    # TRL's alpha divergence knows no float64
    dtype, rtol = (torch.float32, 2e-5) if divergence == "alpha_divergence" else (torch.float64, 1e-10)
    alpha = {"f_alpha_divergence_coef": 0.7} if divergence == "alpha_divergence" else {}
    assert_equals_trl(options_for(name) | {"f_divergence_type": divergence} | alpha, dtype, rtol)


def test_alpha_divergence_at_one_is_reverse_kl() -> None:
    assert_equals_trl({"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ["hinge", "ipo"], "beta": 0.7},
        {"loss_type": ["robust", "aot"], "loss_weights": [2.0, 0.5], "label_smoothing": 0.2},
        {"loss_type": ["discopop"], "discopop_tau": 0.3},
        {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
        {"loss_type": ["ipo", "sft", "aot"], "ld_alpha": 0.0, "loss_weights": [1.0, 2.0, 3.0]},
        {"loss_type": ["sigmoid"], "use_weighting": True},
        {
            "loss_type": ["apo_zero", "ipo"],
            "use_weighting": True,
            "ld_alpha": 0.5,
            "loss_weights": [0.3, 0.7],
        },
    ],
    ids=str,
)
def test_mixes_ld_alpha_and_wpo_equal_trls(options: dict[str, Any]) -> None:
    assert_equals_trl(options)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def smoothed(x: float, eps: float = SMOOTHING) -> float:
    return -(1 - eps) * math.log(sigma(x)) - eps * math.log(sigma(-x))


# Of the log-ratios c and r (chosen, rejected) and their tokens nc and nr, as the papers print them
FORMULAS: dict[str, Callable[[float, float, int, int], float]] = {
    "sigmoid": lambda c, r, nc, nr: -math.log(sigma(BETA * c - BETA * r)),
    "sigmoid_norm": lambda c, r, nc, nr: -math.log(sigma(BETA * c / nc - BETA * r / nr)),
    "hinge": lambda c, r, nc, nr: max(0.0, 1 - BETA * (c - r)),
    "ipo": lambda c, r, nc, nr: (c / nc - r / nr - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda c, r, nc, nr: (
        sigma(BETA * (c - r)) * math.log(sigma(BETA * (c - r)) / (1 - SMOOTHING))
        + sigma(BETA * (r - c)) * math.log(sigma(BETA * (r - c)) / SMOOTHING)
    ),
    "nca_pair": lambda c, r, nc, nr: (
        -math.log(sigma(BETA * c)) - (math.log(sigma(-BETA * c)) + math.log(sigma(-BETA * r))) / 2
    ),
    "robust": lambda c, r, nc, nr: (
        ((1 - SMOOTHING) * -math.log(sigma(BETA * (c - r))) - SMOOTHING * -math.log(sigma(BETA * (r - c))))
        / (1 - 2 * SMOOTHING)
    ),
    "bco_pair": lambda c, r, nc, nr: -math.log(sigma(BETA * c)) - math.log(sigma(-BETA * r)),
    "sppo_hard": lambda c, r, nc, nr: (c - 1 / (2 * BETA)) ** 2 + (r + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda c, r, nc, nr: 1 - sigma(BETA * c) + sigma(BETA * r),
    "apo_down": lambda c, r, nc, nr: sigma(BETA * c) + 1 - sigma(BETA * (c - r)),
    "discopop": lambda c, r, nc, nr: (
        (1 - sigma(BETA * (c - r) / TAU)) * -math.log(sigma(BETA * (c - r)))
        + sigma(BETA * (c - r) / TAU) * math.exp(-BETA * (c - r))
    ),
}


def logratio_pairs(policy: Tensor, reference: Tensor) -> list[tuple[float, float, int, int]]:
    ratios = [part.sum().item() for part in (policy - reference).split(LENGTHS)]
    return list(zip(ratios[0::2], ratios[1::2], LENGTHS[0::2], LENGTHS[1::2], strict=True))


@pytest.mark.parametrize("name", FORMULAS)
def test_each_pair_equals_the_published_formula(name: str) -> None:
    policy, reference = flat_logps(4), flat_logps(5)
    objective = make_objective(**options_for(name))
    expected = [FORMULAS[name](*pair) for pair in logratio_pairs(policy, reference)]
    assert objective(statistics(objective, policy, reference)).tolist() == pytest.approx(expected, rel=1e-12)


def test_aot_compares_sorted_log_ratios_of_policy_and_reference() -> None:
    policy, reference = flat_logps(4), flat_logps(5)

    def sorted_ratios(logps: Tensor) -> list[float]:
        sums = [part.sum().item() for part in logps.split(LENGTHS)]
        return sorted(chosen - rejected for chosen, rejected in zip(sums[0::2], sums[1::2], strict=True))

    gaps = zip(sorted_ratios(policy), sorted_ratios(reference), strict=True)
    expected = sorted(smoothed(BETA * (ours - theirs)) for ours, theirs in gaps)
    objective = make_objective(**options_for("aot"))
    assert sorted(objective(statistics(objective, policy, reference)).tolist()) == pytest.approx(expected)


def test_aot_unpaired_compares_sorted_chosen_and_rejected_rewards() -> None:
    policy, reference = flat_logps(4), flat_logps(5)
    pairs = logratio_pairs(policy, reference)
    gaps = zip(sorted(c for c, *_ in pairs), sorted(r for _, r, *_ in pairs), strict=True)
    expected = [smoothed(BETA * (c - r)) for c, r in gaps]
    objective = make_objective(**options_for("aot_unpaired"))
    assert objective(statistics(objective, policy, reference)).tolist() == pytest.approx(expected)


def test_sft_is_the_negative_log_likelihood_per_chosen_token() -> None:
    policy = flat_logps(4)
    chosen = torch.cat(policy.split(LENGTHS)[0::2])
    loss = step_loss({"loss_type": "sft", "ld_alpha": 0.5}, policy, flat_logps(5))
    assert loss.item() == pytest.approx(-chosen.mean().item())


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_of_sigmoid_is_conservative_dpo(name: str) -> None:
    policy, reference = flat_logps(4), flat_logps(5)
    objective = make_objective(name, beta=BETA, label_smoothing=SMOOTHING)
    pairs = logratio_pairs(policy, reference)
    if name == "sigmoid_norm":
        pairs = [(c / nc, r / nr, nc, nr) for c, r, nc, nr in pairs]
    expected = [smoothed(BETA * (c - r)) for c, r, *_ in pairs]
    assert objective(statistics(objective, policy, reference)).tolist() == pytest.approx(expected)


DERIVATIVES: dict[str, Callable[[float], float]] = {
    "reverse_kl": math.log,
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t ** (0.7 - 1) - 1) / (0.7 - 1),
}


@pytest.mark.parametrize("divergence", DERIVATIVES)
def test_divergences_put_the_derivative_of_f_in_place_of_the_log_ratio(divergence: str) -> None:
    policy, reference = flat_logps(4), flat_logps(5)
    alpha = {"f_alpha_divergence_coef": 0.7} if divergence == "alpha_divergence" else {}
    objective = make_objective("sigmoid", beta=BETA, f_divergence_type=divergence, **alpha)
    derivative = DERIVATIVES[divergence]
    expected = [
        smoothed(BETA * (derivative(math.exp(c)) - derivative(math.exp(r))), eps=0)
        for c, r, *_ in logratio_pairs(policy, reference)
    ]
    assert objective(statistics(objective, policy, reference)).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("divergence", DERIVATIVES)
def test_divergences_stay_finite_far_from_the_reference(divergence: str) -> None:
    objective = make_objective("sigmoid", f_divergence_type=divergence)
    policy = torch.tensor([-900.0, -1000.0, 0.0, -1000.0], requires_grad=True)
    loss = objective(objective.statistics(policy, policy.detach().flip(0), [1, 1, 1, 1])).mean()
    loss.backward()
    assert policy.grad is not None and policy.grad.isfinite().all() and loss.isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_pass_gradcheck(name: str) -> None:
    options, reference = options_for(name), flat_logps(5)
    policy = flat_logps(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda logps: step_loss(options, logps, reference), (policy,))


@pytest.mark.parametrize("divergence", DERIVATIVES)
def test_gradients_of_divergences_pass_gradcheck(divergence: str) -> None:
    options = {"loss_type": ["ipo", "sigmoid"], "f_divergence_type": divergence, "ld_alpha": 0.3}
    policy, reference = flat_logps(4).requires_grad_(), flat_logps(5)
    assert torch.autograd.gradcheck(lambda logps: step_loss(options, logps, reference), (policy,))


AT_REFERENCE = {
    "sigmoid": math.log(2), "sigmoid_norm": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * BETA) ** 2,
    "nca_pair": 2 * math.log(2), "robust": math.log(2), "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 / (2 * BETA) ** 2, "aot": math.log(2), "aot_unpaired": math.log(2), "apo_zero": 1.0,
    "apo_down": 1.0, "discopop": (math.log(2) + 1) / 2,
}  # fmt: skip


@pytest.mark.parametrize("name", AT_REFERENCE)
def test_value_where_the_policy_is_the_reference(name: str) -> None:
    objective = make_objective(**options_for(name))
    logps = flat_logps(6)
    losses = objective(statistics(objective, logps, logps))
    assert losses.tolist() == pytest.approx([AT_REFERENCE[name]] * 4, rel=1e-12)
    elsewhere = statistics(objective, flat_logps(7), logps)
    assert torch.equal(objective.at_reference(elsewhere), losses)


def swapped(flat: Tensor) -> Tensor:
    parts = flat.split(LENGTHS)
    return torch.cat([parts[index ^ 1] for index in range(len(parts))])


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    objective = make_objective("hinge", beta=0.01)  # far from the corner: the loss is 1 - margin
    lengths = [LENGTHS[index ^ 1] for index in range(len(LENGTHS))]
    losses = objective(objective.statistics(flat_logps(4), flat_logps(5), LENGTHS))
    mirrored = objective(objective.statistics(swapped(flat_logps(4)), swapped(flat_logps(5)), lengths))
    torch.testing.assert_close(losses - 1, 1 - mirrored)


def cut(flat: Tensor, first: int, last: int) -> Tensor:
    return torch.cat(flat.split(LENGTHS)[2 * first : 2 * last])


def losses_in_pieces(options: dict[str, Any], bounds: list[int], dtype: torch.dtype) -> Tensor:
    objective = make_objective(**options)
    policy, reference, squares = flat_logps(1, dtype), flat_logps(2, dtype), -flat_logps(3, dtype).abs()
    confidence = [1.0, 0.5, 0.25, 0.9]
    pieces = []
    for first, last in pairwise(bounds):
        pairs = objective.statistics(
            cut(policy, first, last),
            cut(reference, first, last),
            LENGTHS[2 * first : 2 * last],
            per_token_log_squares=cut(squares, first, last),
            confidence=confidence[first:last],
            mean_chosen_length=mean_chosen(LENGTHS),
        )
        pieces.append(objective(pairs))
    return torch.cat(pieces)


@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in COUPLED])
def test_losses_of_pairs_do_not_depend_on_the_cut(name: str, weighting: bool) -> None:
    options = options_for(name) | {"use_weighting": weighting} | ({"ld_alpha": 0.5} if name in OF_DPO else {})
    whole = losses_in_pieces(options, [0, 4], torch.float32)
    assert torch.equal(losses_in_pieces(options, [0, 1, 2, 3, 4], torch.float32), whole)
    assert torch.equal(losses_in_pieces(options, [0, 3, 4], torch.float32), whole)


def test_confidence_multiplies_the_loss_of_its_pair() -> None:
    objective = make_objective("sigmoid")
    plain = objective(statistics(objective, flat_logps(1), flat_logps(2)))
    weighted = objective(statistics(objective, flat_logps(1), flat_logps(2), confidence=[1.0, 0.5, 0.25, 0.1]))
    torch.testing.assert_close(weighted, plain * torch.tensor([1.0, 0.5, 0.25, 0.1], dtype=torch.float64))


def test_wpo_weights_are_geometric_means_and_carry_no_gradient() -> None:
    objective = make_objective("sigmoid", use_weighting=True)
    policy, squares = flat_logps(1).requires_grad_(), -flat_logps(3).abs()
    pairs = statistics(objective, policy, flat_logps(2), per_token_log_squares=squares)
    means = [math.exp(part.mean().item()) for part in (policy.detach() - squares).split(LENGTHS)]
    expected = [chosen * rejected for chosen, rejected in zip(means[0::2], means[1::2], strict=True)]
    assert pairs.weights is not None and not pairs.weights.requires_grad
    assert pairs.weights.tolist() == pytest.approx(expected)
    doubted = statistics(
        objective, policy, flat_logps(2), per_token_log_squares=squares, confidence=[1.0, 0.5, 1.0, 1.0]
    )
    expected[1] /= 2
    assert doubted.weights is not None and doubted.weights.tolist() == pytest.approx(expected)


def test_ld_alpha_scales_tokens_beyond_the_shorter_completion() -> None:
    # chosen 1 + 2 of three tokens shared with a rejected completion of two, its third counts half
    logps = pair_logps(torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0]), [3, 2], ld_alpha=0.5)
    assert (logps.chosen.item(), logps.rejected.item()) == (-5.0, -24.0)


def test_a_micro_batch_without_pairs_has_no_losses() -> None:
    objective = make_objective("sigmoid")
    assert objective(objective.statistics(torch.empty(0), torch.empty(0), [])).shape == (0,)


def test_lengths_must_cut_the_row_into_pairs() -> None:
    with pytest.raises(ValueError, match="3 lengths of 6 tokens"):
        pair_logps(torch.zeros(6), [1, 2, 3])
    with pytest.raises(ValueError, match="2 lengths of 5 tokens"):
        pair_logps(torch.zeros(6), [2, 3])
