"""The preflight tries the dearest micro-batches, finds the token budget, and leaves no trace."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_pairs, tiny_model, with_lora
from training.devices import FakeDevice
from training.runs import adapter_weights, make_training

from qlora_dpo.errors import Interrupted
from qlora_dpo.models.scoring import Scorer
from qlora_dpo.objectives.objective import make_objective
from qlora_dpo.training import loop
from qlora_dpo.training.folder.checkpoints import checkpoints, load_state
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.memory.preflight import MOST, RESERVE, fitting_budget
from qlora_dpo.training.optimizers import make_scheduler
from qlora_dpo.training.records.tracking import read_metrics

TIMES = {"step_seconds", "pairs_per_second", "tokens_per_second", "memory/peak_gib"}


def pairs(count: int = 24, longest: int = 14) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return random_pairs([tuple(row) for row in torch.randint(1, longest, (count, 3), generator=generator).tolist()])


def training_for(
    folder: Path, *, dropout: float = 0.0, optim: str = "adamw_torch", rows: list[Any] | None = None, **options: Any
) -> Training:
    model = with_lora(tiny_model(), zero=True)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout = torch.nn.ModuleDict({"default": torch.nn.Dropout(dropout)})
    settings = {"steps": 6, "max_tokens": 40, "has_dropout": dropout > 0, "weight_decay": 0.1} | options
    training = make_training(model, rows or pairs(), folder, **settings)
    if optim == "adamw_8bit":
        import bitsandbytes

        training.optimizer = training.saver.optimizer = bitsandbytes.optim.AdamW8bit(training.parameters, lr=1e-2)
        training.scheduler = training.saver.scheduler = make_scheduler(
            "constant", training.optimizer, warmup_ratio=0, total_steps=6
        )
    for group in training.optimizer.param_groups:
        group["weight_decay"] = 0.1
    return training


def watch(training: Training, **device: Any) -> FakeDevice:
    """Put a device that counts, and may be full, under the engine."""
    watched = FakeDevice(training.engine.scorer, **device)
    training.engine.scorer = watched  # type: ignore[assignment]
    return watched


def fit_until_signal(training: Training, done: int) -> None:
    """Run until SIGTERM comes in the step after `done` steps."""
    original, steps = training.engine.accumulate_gradient, iter(range(100))

    def stop_in_time(*arguments: Any) -> Any:
        if next(steps) == done:
            training.stop.handle(signal.SIGTERM, None)
        return original(*arguments)

    training.engine.accumulate_gradient = stop_in_time  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=f"checkpoint-{done} is written"):
        fit(training)


def outcome(training: Training) -> tuple[list[dict[str, float]], list[torch.Tensor], dict[str, Any], dict[str, Any]]:
    """Metrics without times, adapter, optimizer and scheduler state, random states of a finished run."""
    rows = [
        {name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(training.run.metrics)
    ]
    optimizer, rng, _ = load_state(checkpoints(training.run.path)[-1][1])
    return rows, adapter_weights(training.engine.model), optimizer, rng


def assert_same(ours: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
    elif isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for name in expected:
            assert_same(ours[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            assert_same(one, other)
    else:
        assert ours == expected


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MIN_STEPS_ON_CPU", 1)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("stop_after", [None, 0, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_run_with_preflight_is_bit_identical_to_one_without(
    dropout: float, stop_after: int | None, optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = training_for(tmp_path / "without", dropout=dropout, optim=optim)
    counted = watch(without)
    fit(without)
    expected = len(counted.tokens)

    monkeypatch.setattr(loop, "MIN_STEPS_ON_CPU", 1)
    tried = 0
    if stop_after is not None:  # the second half, too, begins with a preflight
        first = training_for(tmp_path / "with", dropout=dropout, optim=optim)
        device = watch(first)
        fit_until_signal(first, stop_after)
        tried += len(device.tokens)
    training = training_for(tmp_path / "with", dropout=dropout, optim=optim)
    device = watch(training)
    fit(training)
    tried += len(device.tokens)

    assert tried > expected  # or nothing was tried
    assert_same(outcome(training), outcome(without))


def test_preflight_leaves_the_state_before_step_1_as_it_was(tmp_path: Path, always: None) -> None:
    training = training_for(tmp_path, dropout=0.2)
    before, random_before = adapter_weights(training.engine.model), torch.get_rng_state()
    device = watch(training)
    loop.try_out(training, 0)
    assert device.tokens
    assert [weight.view(torch.int32).tolist() for weight in adapter_weights(training.engine.model)] == [
        weight.view(torch.int32).tolist() for weight in before
    ]
    assert all(parameter.grad is None for parameter in training.parameters)
    assert not any(training.optimizer.state.values())
    assert [group["lr"] for group in training.optimizer.param_groups] == [1e-2]
    assert torch.equal(torch.get_rng_state(), random_before)
    assert training.engine.reference.unknown(range(24)) == list(range(24))


def test_state_in_memory_that_is_never_given_back_is_made_once(tmp_path: Path, always: None) -> None:
    training = training_for(tmp_path, optim="adamw_8bit", steps=2)
    made: list[Any] = []
    original = training.optimizer.init_state

    def init_state(group: Any, parameter: Any, *place: int) -> None:
        made.append(parameter)
        original(group, parameter, *place)

    training.optimizer.init_state = init_state
    fit(training)
    assert len(made) == len(training.parameters)


@pytest.mark.parametrize("kind", ["shared", "padded"])
def test_no_micro_batch_of_the_run_is_larger_than_what_was_tried(kind: Any, tmp_path: Path, always: None) -> None:
    rows = [*pairs(), *random_pairs([(13, 13, 30)])]
    training = training_for(tmp_path, rows=rows, max_tokens=90, eval_steps=2)
    training.engine.scorer = replace(training.engine.scorer, kind=kind)
    training.eval_indices = list(range(12))
    device = watch(training)
    loop.try_out(training, 0)
    tried = list(device.tokens)
    device.tokens.clear()
    fit(training)
    in_run = device.tokens[len(tried) :]
    assert len(in_run) > 12 and max(in_run) <= max(tried) <= 90
    assert len(tried) <= 3


def test_longest_pair_is_tried_also_where_others_fill_a_larger_micro_batch(tmp_path: Path, always: None) -> None:
    rows = random_pairs([(4, 4, 4)] * 8 + [(40, 10, 11)])  # eleven tokens a pair, eight at once; one pair of 59
    training = training_for(tmp_path, rows=rows, steps=2, pairs_per_step=8, in_order=True, max_tokens=60)
    training.schedule = Steps([list(range(8)), [8]])  # type: ignore[assignment]
    device = watch(training)
    training.engine.max_tokens = 80
    loop.try_out(training, 0)
    assert device.tokens == [80, 59]


class Steps:
    """A schedule written down."""

    def __init__(self, steps: list[list[int]]) -> None:
        self._steps = steps
        self.total_steps = len(steps)

    def step(self, number: int) -> list[int]:
        return self._steps[number - 1]


def test_larger_micro_batch_of_an_evaluation_is_tried_too(tmp_path: Path, always: None) -> None:
    rows = random_pairs([(4, 4, 4)] * 12)  # ten tokens a pair
    training = training_for(tmp_path, rows=rows, pairs_per_step=2, max_tokens=1000)
    training.eval_indices = list(range(12))
    device = watch(training)
    loop.try_out(training, 0)
    assert device.tokens == [20, 120]


def test_short_run_on_a_cpu_starts_at_once(tmp_path: Path) -> None:
    training = training_for(tmp_path, steps=loop.MIN_STEPS_ON_CPU - 1)
    device = watch(training)
    loop.try_out(training, 0)
    assert device.tokens == []


@pytest.mark.parametrize(("done", "says"), [(0, "starts again"), (2, "continues from checkpoint-2")])
def test_signal_during_the_preflight_loses_nothing(done: int, says: str, tmp_path: Path, always: None) -> None:
    if done:
        fit_until_signal(training_for(tmp_path), done)
    kept = checkpoints(tmp_path) or [(0, tmp_path / "checkpoint-0")]
    training = training_for(tmp_path)
    device = watch(training)
    original = device.inner

    class Signals(Scorer):
        def per_token_logps_and_squares(self, *arguments: Any, **keywords: Any) -> Any:
            training.stop.handle(signal.SIGTERM, None)
            return super().per_token_logps_and_squares(*arguments, **keywords)

    device.inner = Signals(original.kind, original.head)
    training.eval_indices = list(range(24))
    with pytest.raises(Interrupted, match=f"SIGTERM before step {done + 1}: nothing was lost.*{says}"):
        fit(training)
    assert device.tokens and checkpoints(tmp_path) == kept
    assert Interrupted.exit_code == 75


def test_signal_is_answered_while_the_schedule_is_searched(tmp_path: Path, always: None) -> None:
    training = training_for(tmp_path)
    cuts: list[Any] = []

    def cut(indices: Any) -> list[list[int]]:
        cuts.append(indices)
        training.stop.handle(signal.SIGTERM, None)
        return [list(indices)]

    training.engine.micro_batches = cut  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        loop.try_out(training, 0)
    assert len(cuts) == 1


# The token budget of a device with counters


def budget_on(folder: Path, *, rows: list[Any], loss_type: str = "sigmoid", **device: Any) -> tuple[int, FakeDevice]:
    training = training_for(
        folder, rows=rows, pairs_per_step=8, steps=3, objective=make_objective(loss_type), max_tokens=1
    )
    watched = watch(training, **device)
    training.memory = watched
    loop.try_out(training, 0)
    return training.engine.max_tokens, watched


@pytest.mark.parametrize("free", [30_000, 100_000, 1_000_000])
def test_budget_is_what_leaves_the_reserve(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_dpo.training.memory.preflight.SMALL", 50)
    monkeypatch.setattr("qlora_dpo.training.memory.preflight.LARGE", 150)
    budget, device = budget_on(tmp_path, rows=pairs(48), capacity=free, fixed=5_000, per_token=100)
    limit = (1 - RESERVE) * free
    assert 5_000 + 100 * budget <= limit < 5_000 + 100 * (budget + 1)
    assert f"{budget} tokens go through the model at once" in capsys.readouterr().err
    assert device.tokens[0] == device.tokens[1] <= 50 < device.tokens[2] <= 150
    assert device.most == 0  # the run's own peak starts after the preflight


def test_budget_ends_where_larger_is_no_faster(tmp_path: Path) -> None:
    assert budget_on(tmp_path, rows=pairs(), capacity=10**12, per_token=100)[0] == MOST


def test_pairs_that_never_fill_two_sizes_get_the_largest_budget() -> None:
    assert fitting_budget({40: 1000}, free=5000) == MOST
    assert fitting_budget({40: 1000, 80: 1000}, free=5000) == MOST
    assert fitting_budget({40: 1000, 80: 2000}, free=1000) == 36


def test_budget_that_was_too_hopeful_is_halved_until_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora_dpo.training.memory.preflight.fitting_budget", lambda measured, free: 10_000)
    rows = random_pairs([(4, 4, 4)] * 24)  # ten tokens a pair, eight in a step
    budget, device = budget_on(tmp_path, rows=rows, capacity=3_000, per_token=100)
    assert budget == 20  # 80 do not fit, 40 neither, 30 would
    assert max(device.tokens[-1:]) * 100 <= 3_000
    assert capsys.readouterr().err.count("out of memory") == 2


def test_device_too_small_to_measure_gets_what_fits(tmp_path: Path) -> None:
    rows = random_pairs([(4, 4, 4)] * 24)
    budget, _ = budget_on(tmp_path, rows=rows, capacity=1_500, per_token=100)
    assert budget == 10


def test_pair_that_does_not_fit_alone_fails_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        budget_on(tmp_path, rows=pairs(), capacity=1_000, per_token=100)


@pytest.mark.parametrize(("capacity", "fits"), [(8_000, True), (7_900, False)])
def test_budget_does_not_cut_a_group_of_a_coupled_loss(capacity: int, fits: bool, tmp_path: Path) -> None:
    rows = random_pairs([(4, 4, 4)] * 24)
    if fits:
        _, device = budget_on(tmp_path, rows=rows, loss_type="aot", capacity=capacity, per_token=100)
        assert device.tokens[-1] == 80
    else:
        with pytest.raises(torch.OutOfMemoryError):
            budget_on(tmp_path, rows=rows, loss_type="aot", capacity=capacity, per_token=100)


def test_given_budget_is_not_measured(tmp_path: Path, always: None) -> None:
    training = training_for(tmp_path, max_tokens_per_microbatch=40)
    training.memory = watch(training)
    loop.try_out(training, 0)
    assert training.engine.max_tokens == 40
