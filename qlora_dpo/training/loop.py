"""The training loop: samples, gradient, check, clip, step, log, evaluate, save, stop if asked."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from qlora_dpo.config.training import TrainingOptions
from qlora_dpo.errors import Interrupted, TrainingError
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.training.displacement import DisplacementGuard, Guard, NoGuard
from qlora_dpo.training.engine import Engine
from qlora_dpo.training.folder.checkpoints import restore_rng_states, rng_states
from qlora_dpo.training.folder.resuming import reseeded, resume
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.folder.saving import Saver
from qlora_dpo.training.memory.device_memory import DeviceMemory, within_memory
from qlora_dpo.training.memory.preflight import preflight
from qlora_dpo.training.records.tracking import Metrics, Recorder, cut_back, read_metrics
from qlora_dpo.training.schedule import Schedule
from qlora_dpo.training.signals import StopFlag, StopRequested

MAX_BAD_STEPS = 3  # in a row, before a run with non-finite numbers or without a gradient is stopped
MIN_STEPS_ON_CPU = 100  # for a preflight, which takes as long as one or two steps
IDENTITY_TOLERANCE = 1e-3  # of the rewards at step 1, where the policy is the reference


@dataclass
class Training:
    """Everything that a step reads or changes."""

    run: RunFolder
    options: TrainingOptions
    engine: Engine
    schedule: Schedule
    eval_indices: Sequence[int]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    recorder: Recorder
    stop: StopFlag
    show_samples: Callable[[int], None]
    has_dropout: bool = False
    memory: DeviceMemory | None = None
    parameters: list[nn.Parameter] = field(init=False)
    saver: Saver = field(init=False)
    guard: Guard = field(init=False)
    bad_steps: int = 0

    def __post_init__(self) -> None:
        self.parameters = trainable_parameters(self.engine.model)
        self.saver = Saver(
            self.run,
            self.engine.model,
            self.optimizer,
            self.scheduler,
            self.schedule,
            steps=self.options.save_steps,
            minutes=self.options.save_minutes,
            keep=self.options.save_total_limit,
            ranks=self.engine.ranks,
        )
        has_reference = self.engine.objective.has_reference
        self.guard = DisplacementGuard(self.engine, self.options.on_displacement) if has_reference else NoGuard()
        self.saver.more_state = self.guard.state


def fit(training: Training) -> None:
    """Run the steps that the schedule has left, continuing from the newest valid checkpoint.

    Raises:
        Interrupted: a signal came; a checkpoint of the last whole step has been written.
        StorageError: the disk takes no checkpoints.
        TrainingError: the numbers stopped making sense.
        torch.OutOfMemoryError: a pair does not fit even alone.
    """
    done = begin(training)
    try_out(training, done)
    complete_evaluation(training, done)
    schedule, options = training.schedule, training.options
    progress = tqdm(
        total=schedule.total_steps, initial=done, unit="step", desc=training.engine.method.title, file=sys.stderr,
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    for number in range(done + 1, schedule.total_steps + 1):
        rng_before = rng_states()
        indices = schedule.step(number)
        started = time.perf_counter()
        # Nothing but random states moves within a step, so the state after the step before is still at hand.
        with leaving(training, number - 1, rng_before, f"at step {number}"):
            metrics = gradient(training, indices, rng_before)
        if number == 1 and training.engine.objective.has_reference and not training.has_dropout:
            check_first_step(computed_here(training, metrics, indices))
        metrics |= update(training, metrics, indices)
        metrics |= training.guard.observe(number, metrics)
        metrics |= speed(training, indices, time.perf_counter() - started) | {"epoch": schedule.epoch(number)}
        progress.set_postfix(_shown(metrics), refresh=False)
        progress.update()
        is_last = number == schedule.total_steps
        if number % options.eval_steps == 0 or is_last:
            metrics |= evaluate_or_leave(training, number, metrics)
        if number % options.logging_steps == 0 or is_last or "eval_loss" in metrics:
            training.recorder.log(number, metrics)
        training.guard.check(number, training.saver)
        if is_last:
            training.saver.save_now(number, rng_states())
        elif training.saver.is_due(number):
            training.saver.save(number, rng_states())
    progress.close()


@contextmanager
def leaving(training: Training, step: int, rng: dict[str, Any], where: str) -> Iterator[None]:
    """A signal within this block ends the run, once the checkpoint of `step` with these random states is written."""
    try:
        yield
    except StopRequested as signal:
        training.saver.save_now(step, rng)
        raise Interrupted(f"{signal} {where}: checkpoint-{step} is written; the same command continues.") from None


def begin(training: Training) -> int:
    """Restore the newest valid checkpoint, or write the first one; returns the steps that are done."""
    ranks = training.engine.ranks
    state = resume(
        training.run, training.engine.model, training.optimizer, training.scheduler, training.schedule.total_steps,
        ranks,
    )  # fmt: skip
    ranks.copy_main(training.parameters)
    if state is not None:
        training.guard.restore(state)
        training.saver.newest = int(state["step"])
    elif not ranks.is_main:  # each process has its own dropout
        restore_rng_states(reseeded(rng_states(), training.options.seed + 1_000_003 * ranks.rank))
    training.saver.begin()
    return training.saver.newest or 0


def try_out(training: Training, done: int) -> None:
    """Try the dearest micro-batches of the steps that are left, and on a GPU find the token budget.

    Raises:
        Interrupted: a signal came; nothing has been trained that could be lost.
    """
    schedule = training.schedule
    steps = [schedule.step(number) for number in range(done + 1, schedule.total_steps + 1)]
    engine = training.engine
    if not steps or engine.ranks.is_sharded or (training.memory is None and len(steps) < MIN_STEPS_ON_CPU):
        return
    try:
        engine.ranks.together(lambda: preflight(
            engine, training.optimizer, steps, training.eval_indices, training.stop.check,
            memory=training.memory, find_budget=training.options.max_tokens_per_microbatch is None,
        ))  # fmt: skip
        engine.max_tokens = min(engine.ranks.gather(engine.max_tokens))
    except StopRequested as signal:
        raise Interrupted(
            f"{signal} before step {done + 1}: nothing was lost; the same command "
            + (f"continues from checkpoint-{done}." if done else "starts again.")
        ) from None


def gradient(training: Training, indices: Sequence[int], rng: dict[str, Any]) -> Metrics:
    """Accumulate the gradient of a step that starts from these random states; returns its metrics."""
    engine, pause = training.engine, training.stop.check
    return within_memory(engine, indices, rng, lambda: engine.accumulate_gradient(indices, pause))


def computed_here(training: Training, metrics: Metrics, indices: Sequence[int]) -> Metrics:
    """The metrics of the first step; where stored log-probs move its rewards off 0, those against the reference as it
    is computed here. How far stored ones may lie from these was checked before."""
    if _largest_reward(metrics) <= IDENTITY_TOLERANCE:
        return metrics
    engine = replace(training.engine, reference=training.engine.reference.blank())
    return engine.evaluate(indices, lambda: None)


def check_first_step(metrics: Metrics) -> None:
    """Check that the untrained policy is the reference: both implicit rewards are 0 (so DPO's loss is ln 2).

    Raises:
        TrainingError: it is not, so the reference is wrong and every later number would be too.
    """
    if not _largest_reward(metrics) <= IDENTITY_TOLERANCE:
        raise TrainingError(
            f"at step 1 the rewards are {metrics['rewards/chosen']:.4g} and {metrics['rewards/rejected']:.4g} (loss "
            f"{metrics['loss']:.6f}), but an untrained policy equals its reference, with rewards 0. The reference does "
            "not belong to this model: check --reference_model, or report this with the output of the env command."
        )


def _largest_reward(metrics: Metrics) -> float:
    return float(np.max(np.abs([metrics["rewards/chosen"], metrics["rewards/rejected"]])))


def update(training: Training, metrics: Metrics, indices: Sequence[int]) -> Metrics:
    """Clip and step; with non-finite numbers the adapter stays as it is.

    Raises:
        TrainingError: for the third time in a row the numbers are not finite, or the gradient is zero.
    """
    learning_rate = float(training.scheduler.get_last_lr()[0])
    norm: Any = nn.utils.clip_grad_norm_(training.parameters, training.options.max_grad_norm)
    grad_norm = float(norm.full_tensor() if training.engine.ranks.shards_adapter else norm)
    is_finite = math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)
    if is_finite:
        training.optimizer.step()
        training.scheduler.step()
    training.optimizer.zero_grad(set_to_none=True)
    training.bad_steps = 0 if is_finite and grad_norm > 0 else training.bad_steps + 1
    if training.bad_steps:
        _complain(training, is_finite, indices)
    return {"grad_norm": grad_norm, "learning_rate": learning_rate}


def _complain(training: Training, is_finite: bool, indices: Sequence[int]) -> None:
    origins = ", ".join(training.engine.pairs[index].origin for index in indices)
    what = "the gradient is zero" if is_finite else "loss or gradient is not finite, the step is skipped"
    unit = training.engine.method.unit
    tqdm.write(f"warning: {what}; its {unit} are {origins}", file=sys.stderr)
    if training.bad_steps == MAX_BAD_STEPS:
        raise TrainingError(
            f"{what}, {MAX_BAD_STEPS} times in a row. The last {unit} were {origins}. Lower --learning_rate, look at "
            "these rows, or compare with --dtype float32."
        )


def evaluate_or_leave(training: Training, number: int, metrics: Metrics) -> Metrics:
    """Evaluate after step `number`, which has these metrics.

    Raises:
        Interrupted: a signal came; the step is saved and logged, and evaluated when the run continues.
    """
    with leaving(training, number, rng_states(), "during an evaluation"):
        try:
            return evaluate(training, number)
        except StopRequested:
            training.recorder.log(number, metrics)
            raise


def evaluate(training: Training, number: int) -> Metrics:
    """Metrics of the held-out samples, and sample answers where they were asked for."""
    engine, indices, pause = training.engine, training.eval_indices, training.stop.check
    metrics = within_memory(engine, indices, rng_states(), lambda: engine.evaluate(indices, pause))
    engine.ranks.together(lambda: show_samples(training, number) if engine.ranks.is_main else None)
    return {f"eval_{name}": value for name, value in metrics.items()}


def show_samples(training: Training, number: int) -> None:
    """Sample answers after step `number`, where they were asked for."""
    try:
        training.show_samples(number)
    except OSError as error:
        tqdm.write(f"warning: samples of step {number} cannot be written: {error.strerror or error}", file=sys.stderr)


def complete_evaluation(training: Training, done: int) -> None:
    """Make up for the evaluation of the newest step where a signal cut it short.

    Raises:
        Interrupted: a signal came again.
    """
    is_due = done % training.options.eval_steps == 0 or done == training.schedule.total_steps
    ranks = training.engine.ranks
    rows = ranks.on_main(lambda: read_metrics(training.run.metrics))
    if not (is_due and training.eval_indices and rows and rows[-1]["step"] == done and "eval_loss" not in rows[-1]):
        return
    metrics = {name: value for name, value in rows[-1].items() if name != "step"}
    with leaving(training, done, rng_states(), "during an evaluation"):
        metrics |= evaluate(training, done)
    ranks.on_main(lambda: cut_back(training.run.metrics, done - 1))
    training.recorder.log(done, metrics)


def speed(training: Training, indices: Sequence[int], seconds: float) -> Metrics:
    """Throughput of a step and the process's peak memory."""
    if training.engine.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(training.engine.device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    return {
        "step_seconds": seconds,
        f"{training.engine.method.unit}_per_second": len(indices) / seconds,
        "tokens_per_second": training.engine.tokens(indices) / seconds,
        "memory/peak_gib": peak,
    }


def _shown(metrics: Metrics) -> dict[str, str]:
    """What there is of these, as the progress bar shows it."""
    return {name: f"{metrics[key]:{form}}" for name, key, form in _SHOWN if key in metrics}


_SHOWN = (
    ("loss", "loss", ".4f"),
    ("acc", "rewards/accuracies", ".2f"),
    ("acc", "mean_token_accuracy", ".3f"),
    ("margin", "rewards/margins", ".3f"),
    ("pairs/s", "pairs_per_second", ".2f"),
    ("tok/s", "tokens_per_second", ".0f"),
)
