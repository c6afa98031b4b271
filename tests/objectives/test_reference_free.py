"""SimPO, ORPO and CPO: the published formulas, TRL's values, and no reference anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_dpo.config.training import REFERENCE_FREE
from qlora_dpo.errors import UsageError
from qlora_dpo.objectives.losses import LOSSES
from qlora_dpo.objectives.metrics import CHOSEN_SHIFT, preference_metrics
from qlora_dpo.objectives.objective import make_objective

LENGTHS = [5, 3, 2, 6, 4, 4, 1, 7]  # chosen_0, rejected_0, chosen_1, ...
CHOSEN, REJECTED = LENGTHS[0::2], LENGTHS[1::2]
BETA, GAMMA, ALPHA = 2.0, 0.7, 0.6
OPTIONS: dict[str, dict[str, Any]] = {
    "simpo": {"loss_type": "simpo", "beta": BETA, "simpo_gamma": GAMMA},
    "orpo": {"loss_type": "orpo", "beta": BETA},
    "cpo": {"loss_type": "cpo", "beta": BETA, "cpo_alpha": ALPHA},
}


def policy_row() -> Tensor:
    return -3 * torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sums(row: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of the chosen and of the rejected completions."""
    logps = torch.stack([part.sum() for part in row.split(LENGTHS)])
    return logps[0::2], logps[1::2]


def losses(row: Tensor, **options: Any) -> Tensor:
    objective = make_objective(**options)
    mean_chosen = sum(CHOSEN) / len(CHOSEN)
    return objective(objective.statistics(row, torch.zeros_like(row), LENGTHS, mean_chosen_length=mean_chosen))


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


# Of log p of chosen and rejected (c, r) and their tokens, as the papers print them; the NLL is added below
FORMULAS: dict[str, Callable[[float, float, int, int], float]] = {
    "simpo": lambda c, r, nc, nr: -math.log(sigma(BETA / nc * c - BETA / nr * r - GAMMA)),
    "orpo": lambda c, r, nc, nr: -BETA * math.log(sigma(math.log(odds(math.exp(c / nc)) / odds(math.exp(r / nr))))),
    "cpo": lambda c, r, nc, nr: -math.log(sigma(BETA * c - BETA * r)),
}
NLL = {"simpo": 0.0, "orpo": 1.0, "cpo": ALPHA}


def test_the_options_name_the_rows_without_a_reference() -> None:
    assert {name for name, loss in LOSSES.items() if loss.reference_free} == set(REFERENCE_FREE)
    assert not make_objective(["simpo", "sft"]).has_reference and make_objective(["sigmoid", "sft"]).has_reference


@pytest.mark.parametrize("name", FORMULAS)
def test_the_mean_loss_is_the_published_formula(name: str) -> None:
    row = policy_row()
    chosen, rejected = (side.tolist() for side in sums(row))
    pairs = list(zip(chosen, rejected, CHOSEN, REJECTED, strict=True))
    preferences = [FORMULAS[name](*pair) for pair in pairs]
    expected = sum(preferences) / len(pairs) - NLL[name] * sum(chosen) / sum(CHOSEN)
    assert losses(row, **OPTIONS[name]).mean().item() == pytest.approx(expected, rel=1e-13)
    if not NLL[name]:
        assert losses(row, **OPTIONS[name]).tolist() == pytest.approx(preferences, rel=1e-13)


def trl_value(name: str, row: Tensor, smoothing: float = 0.0) -> Tensor:
    chosen, rejected = sums(row)
    if name != "cpo":
        chosen, rejected = chosen / torch.tensor(CHOSEN), rejected / torch.tensor(REJECTED)
    settings = SimpleNamespace(
        beta=BETA, alpha=0.0, label_smoothing=smoothing, simpo_gamma=GAMMA,
        loss_type="simpo" if name == "simpo" else "sigmoid", accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    nll = -torch.cat(row.split(LENGTHS)[0::2]).mean()
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        return nll - ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)[0].mean()
    from trl.experimental.cpo import CPOTrainer

    return CPOTrainer.cpo_loss(settings, chosen, rejected)[0].mean() + NLL[name] * nll


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize(("name", "smoothing"), [("simpo", 0), ("simpo", 0.2), ("orpo", 0), ("cpo", 0), ("cpo", 0.2)])
def test_values_and_gradients_equal_trls(name: str, smoothing: float) -> None:
    rtol = 1e-5 if name == "orpo" else 1e-12  # TRL's ORPO computes in float32
    row = policy_row().requires_grad_()
    ours = losses(row, **OPTIONS[name], label_smoothing=smoothing).mean()
    theirs = trl_value(name, row, smoothing)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0, check_dtype=False)
    torch.testing.assert_close(*(torch.autograd.grad(loss, row)[0] for loss in (ours, theirs)), rtol=rtol, atol=1e-8)


def test_orpo_of_a_certain_answer_has_finite_gradients() -> None:
    row = torch.zeros(sum(LENGTHS), requires_grad=True)
    losses(row, **OPTIONS["orpo"]).mean().backward()
    assert row.grad is not None and row.grad.isfinite().all()


@pytest.mark.parametrize("name", FORMULAS)
def test_logged_rewards_are_those_that_the_loss_compares(name: str) -> None:
    objective = make_objective(**OPTIONS[name])
    row = policy_row()
    pairs = objective.statistics(row, torch.zeros_like(row), LENGTHS)
    values = preference_metrics(
        row, pairs, BETA, has_reference=objective.has_reference, averages_rewards=objective.averages_rewards
    )
    chosen, rejected = sums(row)
    if name != "cpo":
        chosen, rejected = chosen / torch.tensor(CHOSEN), rejected / torch.tensor(REJECTED)
    torch.testing.assert_close(values["rewards/chosen"], BETA * chosen)
    torch.testing.assert_close(values["rewards/margins"], BETA * (chosen - rejected))
    assert CHOSEN_SHIFT not in values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["simpo", "sigmoid"]}, "without a reference"),
        ({"loss_type": ["simpo", "orpo"]}, "beta means another thing"),
        ({"loss_type": "simpo", "ld_alpha": 0.5}, "defined for DPO"),
        ({"loss_type": "cpo", "f_divergence_type": "forward_kl"}, "does not work with cpo"),
        ({"loss_type": "orpo", "label_smoothing": 0.1}, "orpo would ignore it"),
        ({"simpo_gamma": 1.0}, "use simpo"),
        ({"loss_type": "simpo", "cpo_alpha": 0.0}, "use cpo"),
        ({"loss_type": "simpo", "simpo_gamma": -1.0}, "from 0 on"),
    ],
    ids=str,
)
def test_combinations_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_objective(**options)
