"""Chosen answers that fall are noticed, said, held up or a reason to stop; and a broken run continues exactly."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import IdPair, random_pairs, tiny_model, with_lora
from training.runs import adapter_weights, make_training, run

from qlora_dpo.errors import Interrupted, TrainingError
from qlora_dpo.objectives.metrics import CHOSEN_SHIFT
from qlora_dpo.objectives.objective import make_objective
from qlora_dpo.training.displacement import LIMIT, MEMORY, NLL_WEIGHT, DisplacementGuard
from qlora_dpo.training.folder.checkpoints import newest_valid
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.records.tracking import read_metrics

SENTENCE = "nats less likely than under the reference"


def guard(mode: str = "warn", loss_type: str | list[str] = "sigmoid") -> DisplacementGuard:
    return DisplacementGuard(SimpleNamespace(objective=make_objective(loss_type)), mode)  # type: ignore[arg-type]


def observe(watcher: DisplacementGuard, shifts: list[float]) -> list[dict[str, float]]:
    return [watcher.observe(number, {CHOSEN_SHIFT: shift}) for number, shift in enumerate(shifts, 1)]


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if SENTENCE in line]


# A made trajectory


def test_the_mean_is_exponential_over_about_ten_steps() -> None:
    rows = observe(guard(), [-0.05, -0.05, 0.02])
    expected = [-0.005, -0.0095, -0.00655]
    assert [row["displacement/smoothed"] for row in rows] == pytest.approx(expected)
    assert observe(guard(), [-0.05] * MEMORY)[-1]["displacement/smoothed"] == pytest.approx(-0.05 * (1 - 0.9**10))


def test_a_slight_fall_and_one_odd_batch_are_normal(capsys: pytest.CaptureFixture[str]) -> None:
    observe(guard(), [-0.09] * 200)
    observe(guard(), [0.0] * 20 + [-0.9] + [0.0] * 20)
    assert warnings(capsys) == []


def test_a_fall_is_said_once_and_again_each_time_it_has_doubled(capsys: pytest.CaptureFixture[str]) -> None:
    rows = observe(guard(), [-0.01 * step for step in range(1, 101)])  # down to -0.9 in the mean
    said = warnings(capsys)
    crossed = [
        next(step for step, row in enumerate(rows, 1) if row["displacement/smoothed"] <= LIMIT * double)
        for double in (1, 2, 4, 8)
    ]
    assert [f"at step {step} " in line for step, line in zip(crossed, said, strict=True)] == [True] * 4
    assert "chosen answers is 0.10 nats less likely" in said[0] and "2410.08847" in said[0]
    assert "hold them up with --loss_type sigmoid,sft or --on_displacement nll" in said[0]


def test_a_sudden_fall_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    observe(guard(), [-50.0] + [-5.0] * 3)
    assert len(warnings(capsys)) == 1


def test_a_step_without_a_finite_number_is_left_out() -> None:
    watcher = guard()
    observe(watcher, [-0.05, math.nan, -math.inf])
    assert watcher.smoothed == pytest.approx(-0.005)


def test_advice_does_not_name_what_the_run_does_already(capsys: pytest.CaptureFixture[str]) -> None:
    observe(guard(loss_type=["sigmoid", "sft"]), [-2.0])
    assert "raise the weight of sft in --loss_weights" in warnings(capsys)[0]
    observe(guard("nll", "ipo"), [-2.0, -4.0])
    switch, advice = warnings(capsys)
    assert "from the next step on their NLL is added to the loss with weight 1." in switch
    assert "use --loss_type ipo,sft from the first step on" in advice


def test_state_survives_a_checkpoint_to_the_last_bit() -> None:
    before = guard("nll")
    observe(before, [-0.3, -0.7, -1.1])
    after = guard("nll")
    after.restore(json.loads(json.dumps(before.state() | {"step": 3})))
    assert after.state() == before.state() and before.has_fallen
    assert after.engine.objective.names == ["sigmoid", "sft"]
    untouched = guard("nll")
    untouched.restore({"step": 3})  # a checkpoint from before there was a guard
    assert untouched.state() == guard().state() and untouched.engine.objective.names == ["sigmoid"]


def test_objective_is_the_asked_one_where_the_mode_is_not_nll() -> None:
    after = guard("warn")
    after.restore({"displacement": {"smoothed": -0.5, "limit": -0.8, "has_fallen": True}})
    assert after.engine.objective.names == ["sigmoid"]


# Real runs


CHOSEN, REJECTED, BETWEEN = 10, 11, 12


def provoking_model() -> Any:
    """A model in which the way from the rejected to the chosen answer leads to a third one (arXiv 2410.08847, section
    4): the output rows of the two are similar, and along their difference another token's row is much longer."""
    model = tiny_model()
    difference = 0.08 * torch.randn(64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[CHOSEN], rows[REJECTED] = rows[CHOSEN] + 0.15 * difference, rows[CHOSEN] - 0.15 * difference
        rows[BETWEEN] = 8 * difference
    return with_lora(model, zero=True)


def similar_pairs() -> list[IdPair]:
    return [IdPair(pair.prompt_ids, [CHOSEN], [REJECTED]) for pair in random_pairs([(4, 1, 1)] * 8, seed=1)]


# Two micro-batches a step; the limit is crossed at step 5.
SETTINGS: dict[str, Any] = {"steps": 14, "pairs_per_step": 4, "learning_rate": 1e-3, "max_tokens": 8}


def displaced(folder: Path, mode: str, **changes: Any) -> tuple[list[dict[str, Any]], Training]:
    training = make_training(provoking_model(), similar_pairs(), folder, on_displacement=mode, **(SETTINGS | changes))
    fit(training)
    return read_metrics(training.run.metrics), training


def column(rows: list[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]


def test_provoked_displacement_is_logged_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, training = displaced(tmp_path, "warn")
    smoothed = column(rows, "displacement/smoothed")
    assert rows[0][CHOSEN_SHIFT] == 0 and smoothed[-1] <= LIMIT
    assert f"at step {next(step for step, value in enumerate(smoothed, 1) if value <= LIMIT)} " in warnings(capsys)[0]
    assert rows[-1][CHOSEN_SHIFT] == pytest.approx(shift_by_hand(training, -1), abs=1e-5)
    assert f"eval_{CHOSEN_SHIFT}" in rows[-1] and "displacement/nll_weight" not in rows[-1]


def shift_by_hand(training: Training, _step: int) -> float:
    """Of the last step's pairs, from the weights before that step: the run is repeated without its last step."""
    fresh = make_training(
        provoking_model(), similar_pairs(), training.run.path / "again",
        **(SETTINGS | {"steps": SETTINGS["steps"] - 1}),
    )  # fmt: skip
    fit(fresh)
    model, shifts = fresh.engine.model, []
    for index in training.schedule.step(SETTINGS["steps"]):
        pair = training.engine.pairs[index]
        ids = torch.tensor([pair.prompt_ids + pair.chosen_ids])
        with torch.no_grad():
            policy = model(input_ids=ids).logits.log_softmax(-1)
            with model.disable_adapter():
                reference = model(input_ids=ids).logits.log_softmax(-1)
        shift = (policy - reference)[0, len(pair.prompt_ids) - 1 : -1]
        shifts.append(shift.gather(-1, torch.tensor([pair.chosen_ids]).T).mean().item())
    return sum(shifts) / len(shifts)


def test_nll_holds_the_chosen_answers_up_from_the_next_step_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    falling, _ = displaced(tmp_path / "warn", "warn", steps=20)
    capsys.readouterr()
    held, training = displaced(tmp_path / "nll", "nll", steps=20)
    said = warnings(capsys)
    switch = next(step for step, value in enumerate(column(held, "displacement/smoothed"), 1) if value <= LIMIT)
    assert f"at step {switch} " in said[0] and "their NLL is added to the loss with weight 1." in said[0]
    assert column(held, "displacement/nll_weight") == [0.0] * switch + [NLL_WEIGHT] * (20 - switch)
    assert column(held, "loss")[:switch] == column(falling, "loss")[:switch]
    assert held[switch]["loss"] > falling[switch]["loss"] + 0.5  # the same weights, and now with the NLL
    assert column(held, CHOSEN_SHIFT)[-1] > column(falling, CHOSEN_SHIFT)[-1] + 0.5
    assert training.engine.objective.names == ["sigmoid", "sft"]


def test_stop_leaves_a_checkpoint_that_another_setting_continues(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=SENTENCE) as stopped:
        displaced(tmp_path, "stop", steps=20)
    checkpoint, rejected = newest_valid(tmp_path)
    assert checkpoint is not None and not rejected
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert str(stopped.value).startswith(f"at step {step} ")
    assert f"checkpoint-{step} is written: the same command continues until" in str(stopped.value)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["displacement"]["has_fallen"]
    rows, training = displaced(tmp_path, "nll", steps=20)
    assert column(rows, "step") == list(range(1, 21))
    assert "displacement/nll_weight" not in rows[step - 1] and rows[step]["displacement/nll_weight"] == NLL_WEIGHT
    assert training.engine.objective.names == ["sigmoid", "sft"]


def test_stopped_run_goes_on_with_the_same_command_until_the_fall_doubles(tmp_path: Path) -> None:
    stops = []
    for _ in range(2):
        with pytest.raises(TrainingError, match=SENTENCE):
            displaced(tmp_path, "stop", steps=20)
        checkpoint, _ = newest_valid(tmp_path)
        assert checkpoint is not None
        stops.append(json.loads((checkpoint / "trainer_state.json").read_text()))
    assert stops[0]["step"] < stops[1]["step"]
    assert stops[0]["displacement"]["smoothed"] <= LIMIT and stops[1]["displacement"]["smoothed"] <= 2 * LIMIT


TIMED = ("step_seconds", "pairs_per_second", "tokens_per_second", "memory/peak_gib")


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


@pytest.mark.parametrize("polls", [3, 8, 9, 10, 11, 17])  # before, within, right after and after step 5
def test_run_that_is_broken_and_continued_equals_an_unbroken_one(polls: int, tmp_path: Path) -> None:
    unbroken, whole = displaced(tmp_path / "unbroken", "nll")
    assert 0 < sum(column(unbroken, "displacement/nll_weight")) < len(unbroken) - 2

    training = make_training(provoking_model(), similar_pairs(), tmp_path / "broken", on_displacement="nll", **SETTINGS)
    left = iter(range(polls))

    def check() -> None:
        if next(left, None) is None:
            training.stop.handle(signal.SIGTERM, None)
        type(training.stop).check(training.stop)

    training.stop.check = check  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        fit(training)
    continued, again = displaced(tmp_path / "broken", "nll")
    assert comparable(continued) == comparable(unbroken)
    for ours, expected in zip(adapter_weights(again.engine.model), adapter_weights(whole.engine.model), strict=True):
        assert torch.equal(ours, expected)


def test_guard_changes_nothing_where_nothing_falls(tmp_path: Path) -> None:
    options = {**SETTINGS, "learning_rate": 1e-5}
    losses = [
        column(
            run(provoking_model(), similar_pairs(), tmp_path / mode, on_displacement=mode, **options),
            "loss",
        )
        for mode in ("warn", "nll", "stop")
    ]
    assert losses[0] == losses[1] == losses[2]
