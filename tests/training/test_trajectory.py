"""Laws 2 to 4: how a step is cut changes nothing, the first step is the reference's, only LoRA weights move."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IdPair, random_pairs, tiny_model, with_lora
from training.runs import CPU, adapter_weights, make_training, run

from qlora_dpo.data.packing import cut
from qlora_dpo.errors import TrainingError
from qlora_dpo.models.activation_checkpointing import set_activation_checkpointing
from qlora_dpo.models.scoring import Scorer, choose_scorer
from qlora_dpo.objectives.objective import make_objective
from qlora_dpo.training.loop import check_first_step, fit


def pairs(count: int = 24) -> list[IdPair]:
    generator = torch.Generator().manual_seed(5)
    return random_pairs([tuple(row) for row in (torch.randint(1, 14, (count, 3), generator=generator)).tolist()])


def trajectory(
    folder: Path, *, level: str = "none", kind: str = "shared", **options: Any
) -> tuple[list[float], list[torch.Tensor]]:
    model = with_lora(tiny_model(), zero=True)
    scorer = replace(choose_scorer(model, pairs()[0], CPU), kind=kind)
    assert set_activation_checkpointing(model, level) == 2  # type: ignore[arg-type]
    metrics = run(model, pairs(), folder, steps=8, scorer=scorer, **options)
    return [row["loss"] for row in metrics], adapter_weights(model)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 30},
        {"max_tokens": 60},
        {"level": "selective"},
        {"level": "full"},
        {"kind": "padded"},
        {"kind": "padded", "max_tokens": 60},
        {"max_tokens": 30, "level": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("loss_type", [["sigmoid"], ["sigmoid", "sft"], ["aot"]], ids="+".join)
def test_cut_and_checkpointing_do_not_change_the_trajectory(
    change: dict[str, Any], loss_type: list[str], tmp_path: Path
) -> None:
    objective = make_objective(loss_type)
    expected_losses, expected_weights = trajectory(tmp_path / "whole", objective=objective)
    losses, weights = trajectory(tmp_path / "changed", objective=objective, **change)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    for ours, expected in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_budgets_really_cut() -> None:
    assert len(cut(pairs(4), 10_000, "shared")) == 1
    assert len(cut(pairs(4), 30, "shared")) > 1


def test_reference_computed_once_gives_the_same_trajectory_as_each_epoch_anew(tmp_path: Path) -> None:
    def losses(forget: bool) -> list[float]:
        training = make_training(with_lora(tiny_model(), zero=True), pairs(8), tmp_path / str(forget), steps=6)
        if forget:
            known = training.engine.reference._known
            training.stop.check = lambda: known.clear()  # type: ignore[method-assign]
        fit(training)
        from qlora_dpo.training.records.tracking import read_metrics

        return [row["loss"] for row in read_metrics(training.run.metrics)]

    assert losses(forget=False) == losses(forget=True)


def test_first_step_is_ln_2_with_margins_0(tmp_path: Path) -> None:
    metrics = run(with_lora(tiny_model(), zero=True), pairs(), tmp_path, steps=1)
    assert abs(metrics[0]["loss"] - math.log(2)) < 1e-6
    assert metrics[0]["rewards/margins"] == 0


def test_wrong_reference_stops_the_run_at_step_1(tmp_path: Path) -> None:
    training = make_training(with_lora(tiny_model(), zero=True), pairs(), tmp_path, steps=2)
    score = training.engine.reference._score
    training.engine.reference._score = lambda batch: score(batch) + 0.5  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="untrained policy equals its reference"):
        fit(training)


def test_first_step_check_refuses_nan() -> None:
    with pytest.raises(TrainingError):
        check_first_step({"rewards/chosen": math.nan, "rewards/rejected": 0.0, "loss": 0.6931})


def test_swapping_chosen_and_rejected_mirrors_the_margin(tmp_path: Path) -> None:
    model = with_lora(tiny_model())
    swapped = [replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in pairs()]
    scorer: Scorer = choose_scorer(model, pairs()[0], CPU)
    margins = [
        make_training(model, rows, tmp_path / name, steps=1, scorer=scorer).engine.evaluate(range(24), lambda: None)
        for name, rows in (("as_is", pairs()), ("swapped", swapped))
    ]
    assert margins[0]["rewards/margins"] == pytest.approx(-margins[1]["rewards/margins"], abs=1e-5)
    assert abs(margins[0]["rewards/margins"]) > 1e-3


def test_non_finite_numbers_never_reach_the_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_lora(tiny_model(), zero=True)
    training = make_training(model, pairs(), tmp_path, steps=5, has_dropout=True)
    before = adapter_weights(model)
    score = training.engine.reference._score
    training.engine.reference._score = lambda batch: score(batch) * math.nan  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="3 times in a row"):
        fit(training)
    assert all(torch.equal(ours, then) for ours, then in zip(adapter_weights(model), before, strict=True))
    assert "its pairs are made" in capsys.readouterr().err
