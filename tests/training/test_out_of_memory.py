"""Out of memory in a step or an evaluation: half the token budget, the same step again, the same result."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_pairs
from training.devices import FakeDevice
from training.runs import adapter_weights
from training.test_preflight import assert_same, outcome, pairs, training_for, watch

from qlora_dpo.cli import main
from qlora_dpo.models.scoring import Scorer
from qlora_dpo.objectives.objective import make_objective
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.records.tracking import read_metrics

BUDGET = 60


def full_once(
    folder: Path, at: int, *, cut_shows: bool = False, **options: Any
) -> tuple[Training, FakeDevice, list[int]]:
    """A run on a device that is full at the at-th micro-batch; with the budget after each start of a step."""
    training = training_for(folder, max_tokens=BUDGET, rows=pairs(12), **options)
    device = watch(training, full_at=(at,))
    if cut_shows:
        let_reference_depend_on_the_cut(training)
    budgets = record_budgets(training)
    fit(training)
    return training, device, budgets


def let_reference_depend_on_the_cut(training: Training) -> None:
    """Make visible what rounding does on larger machines: log-probs that a failed attempt left behind are others."""
    score = training.engine.reference._score
    training.engine.reference._score = lambda batch: score(batch) + 1e-6 * batch.input_ids.numel()  # type: ignore[method-assign]


def record_budgets(training: Training, given: list[int] | None = None) -> list[int]:
    """The budget with which each attempt of a step starts; `given` sets it instead, step by step."""
    original, budgets = training.engine.accumulate_gradient, []
    steps = iter(given or [])

    def recorded(*arguments: Any) -> Any:
        training.engine.max_tokens = next(steps, training.engine.max_tokens)
        budgets.append(training.engine.max_tokens)
        return original(*arguments)

    training.engine.accumulate_gradient = recorded  # type: ignore[method-assign]
    return budgets


# Adam divides by tiny second moments, so rounding that the larger gradient of sft brings shows in the weights.
@pytest.mark.parametrize(("loss_type", "tolerance"), [(["sigmoid"], 1e-6), (["sigmoid", "sft"], 2e-5)])
@pytest.mark.parametrize("at", [1, 2, 8, 9])  # first and later steps, and the second epoch
def test_trajectory_is_that_of_the_unbroken_run(
    at: int, loss_type: list[str], tolerance: float, tmp_path: Path
) -> None:
    objective = make_objective(loss_type)
    broken, _, budgets = full_once(tmp_path / "broken", at, objective=objective)
    assert len(budgets) == 7 and budgets[-1] < BUDGET
    unbroken = training_for(tmp_path / "unbroken", max_tokens=BUDGET, rows=pairs(12), objective=objective)
    fit(unbroken)
    ours, expected = ([row["loss"] for row in read_metrics(training.run.metrics)] for training in (broken, unbroken))
    assert ours == pytest.approx(expected, abs=1e-6, rel=1e-6)
    for weight, other in zip(adapter_weights(broken.engine.model), adapter_weights(unbroken.engine.model), strict=True):
        torch.testing.assert_close(weight, other, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("at", [2, 8, 9])
def test_run_is_bit_identical_to_one_with_the_smaller_budget_from_that_step(
    at: int, dropout: float, tmp_path: Path
) -> None:
    broken, _, budgets = full_once(tmp_path / "broken", at, cut_shows=True, dropout=dropout)
    step = next(place for place, budget in enumerate(budgets) if budget < BUDGET)  # the repetition
    same = training_for(tmp_path / "same", max_tokens=BUDGET, rows=pairs(12), dropout=dropout)
    watch(same)
    let_reference_depend_on_the_cut(same)
    record_budgets(same, given=[*budgets[: step - 1], *budgets[step:]])
    fit(same)
    assert_same(outcome(broken), outcome(same))


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Memory is freed by the last reference alone, as it must be when a GPU is full."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_repeated_step_does_not_hold_the_failed_graph(
    without_collector: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, device, budgets = full_once(tmp_path, 2)
    assert device.graphs_alive_at_retry == [False]
    assert capsys.readouterr().err.count("out of memory") == 1
    assert budgets[1] == budgets[-1] < BUDGET  # and it stays small


def test_evaluation_that_does_not_fit_is_repeated_in_parts(tmp_path: Path) -> None:
    rows = random_pairs([(4, 4, 4)] * 12)  # ten tokens a pair
    results = []
    for name, capacity in (("whole", float("inf")), ("cut", 70)):
        training = training_for(tmp_path / name, rows=rows, pairs_per_step=2, max_tokens=1000)
        training.eval_indices = list(range(12))
        device = watch(training, capacity=capacity)
        fit(training)
        last = read_metrics(training.run.metrics)[-1]
        results.append([last[key] for key in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen")])
        assert device.tokens[-1] == (120 if name == "whole" else 60)
    assert results[1] == pytest.approx(results[0], abs=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_budget_never_falls_below_what_cannot_be_cut(loss_type: str, tmp_path: Path) -> None:
    rows = random_pairs([(4, 4, 4)] * 7 + [(9, 9, 9)])  # ten tokens a pair, one of 25
    training = training_for(
        tmp_path, rows=rows, pairs_per_step=4, in_order=True, steps=2, max_tokens=1000,
        objective=make_objective(loss_type),
    )  # fmt: skip
    device = watch(training, capacity=24)
    with pytest.raises(torch.OutOfMemoryError, match=f"{20 if loss_type == 'sigmoid' else 40} tokens|25 tokens"):
        fit(training)
    steps = {"sigmoid": [40, 20, 20, 25], "aot": [40]}
    assert device.tokens == steps[loss_type]


def test_budget_stays_at_the_longest_pair(tmp_path: Path) -> None:
    rows = random_pairs([(9, 9, 9), (4, 4, 4), *[(4, 4, 4)] * 4])  # 25 and 10 tokens do not fit together
    training = training_for(tmp_path, rows=rows, pairs_per_step=2, in_order=True, steps=3, max_tokens=1000)
    device = watch(training, capacity=30)
    fit(training)
    assert training.engine.max_tokens == 25  # not half of 35
    assert device.tokens[:5] == [35, 25, 10, 20, 20]


def test_command_says_it_in_one_sentence(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    scored = Scorer.per_token_logps_and_squares

    def full(self: Any, model: Any, batch: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return scored(self, model, batch, **options)

    monkeypatch.setattr(Scorer, "per_token_logps_and_squares", full)
    options = {
        "--model_name_or_path": model_folder, "--dataset": pairs_file, "--output_dir": tmp_path / "run",
        "--max_steps": 2, "--dtype": "float32",
    }  # fmt: skip
    code = main(["train", *(str(part) for pair in options.items() for part in pair)])
    error = capsys.readouterr().err
    assert code == 71 and "error: cpu ran out of memory while training" in error and "Traceback" not in error
