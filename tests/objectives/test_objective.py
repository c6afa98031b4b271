"""An objective is refused with a reason, or read in full: no option is ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora_dpo.errors import UsageError
from qlora_dpo.objectives.losses import LOSSES
from qlora_dpo.objectives.objective import make_objective


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmod"}, "Did you mean 'sigmoid'"),
        ({"loss_type": ["sigmoid", "kto"]}, "loss_type 'kto' is unknown"),
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 losses"),
        ({"loss_weights": [0.0]}, "loss_weights has 0.0 for sigmoid"),
        ({"loss_weights": [float("nan")]}, "loss_weights has nan"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"beta": float("inf")}, "beta is inf"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "from 0 to below 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"loss_type": "exo_pair"}, "exo_pair takes its logarithm"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "hinge would ignore it"),
        ({"discopop_tau": 0.1}, "would ignore it"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau is 0.0"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5"),
        ({"ld_alpha": -0.5}, "ld_alpha is -0.5"),
        ({"f_divergence_type": "reverse_lk"}, "Did you mean 'reverse_kl'"),
        ({"f_alpha_divergence_coef": 0.2}, "'reverse_kl' would ignore it"),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": float("nan")}, "exponent"),
        (
            {"loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "forward_kl"},
            "does not work with bco_pair",
        ),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting does not work with aot"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_with_the_reason(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_objective(**options)


def test_confidence_is_refused_where_losses_belong_to_no_pair() -> None:
    objective = make_objective("aot")
    row = torch.zeros(4)
    objective.statistics(row, row, [1, 1, 1, 1], confidence=[1.0, 1.0])
    with pytest.raises(UsageError, match="confidence below 1"):
        objective.statistics(row, row, [1, 1, 1, 1], confidence=[1.0, 0.5])


def test_missing_inputs_are_named() -> None:
    row = torch.zeros(2)
    with pytest.raises(ValueError, match="per_token_log_squares"):
        make_objective("sigmoid", use_weighting=True).statistics(row, row, [1, 1])
    with pytest.raises(ValueError, match="mean_chosen_length"):
        objective = make_objective("sft")
        objective(objective.statistics(row, row, [1, 1]))


def test_properties_tell_the_loop_what_a_mix_needs() -> None:
    assert not make_objective("sigmoid").couples_pairs
    assert not make_objective("sigmoid").needs_token_normalizer
    mix = make_objective(["sigmoid", "sft", "aot_unpaired"], beta=0.2)
    assert mix.couples_pairs and mix.needs_token_normalizer and mix.beta == 0.2
    assert {name for name, loss in LOSSES.items() if loss.couples_pairs} == {"aot", "aot_unpaired"}


def test_a_list_of_one_and_a_bare_name_are_the_same() -> None:
    assert make_objective("ipo").terms == make_objective(["ipo"]).terms
