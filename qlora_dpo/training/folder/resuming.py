"""Continuing a run: from which checkpoint, and what of it holds although an option was allowed to change."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.errors import ModelError, UsageError
from qlora_dpo.models.lora import restore_adapter
from qlora_dpo.training.folder.checkpoints import (
    clear_leftovers,
    load_state,
    newest_valid,
    other_versions,
    restore_rng_states,
)
from qlora_dpo.training.folder.run_folder import SAMPLES, RunFolder
from qlora_dpo.training.records.tracking import cut_back

Optimizer = torch.optim.Optimizer
Scheduler = torch.optim.lr_scheduler.LRScheduler


def resume(
    run: RunFolder, model: Any, optimizer: Optimizer, scheduler: Scheduler, total_steps: int
) -> dict[str, Any] | None:
    """Restore the newest valid checkpoint and cut the records back to it; returns its trainer state, if there is one.

    Raises:
        ModelError, UsageError: it does not fit the options of this run.
        StorageError: the records cannot be cut back.
    """
    clear_leftovers(run.path)
    checkpoint, rejected = newest_valid(run.path)
    for reason in rejected:
        print(reason, file=sys.stderr)
    state = None
    if checkpoint is not None:
        state = _restore(checkpoint, model, optimizer, scheduler)
        print(f"Continuing from {checkpoint.name} of {total_steps} steps.", file=sys.stderr)
    step = int(state["step"]) if state else 0
    cut_back(run.metrics, step)
    if (run.path / SAMPLES).is_file():
        cut_back(run.path / SAMPLES, step)
    return state


def _restore(checkpoint: Path, model: Any, optimizer: Optimizer, scheduler: Scheduler) -> dict[str, Any]:
    moments, rng, state = load_state(checkpoint)
    kind, asked = state.get("optimizer"), type(optimizer).__name__
    if kind not in (None, asked):
        raise UsageError(
            f"{checkpoint} was written with the optimizer {kind}, and here it would be {asked}: --optim auto depends "
            "on the device. Continue on such a device as before, or start anew with --fresh."
        )
    try:
        restore_adapter(model, checkpoint)
        restore_optimizer(optimizer, scheduler, moments)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{checkpoint} does not fit this run ({reason}). Continue it with the options that it began with, or start "
            "anew with --fresh."
        ) from error
    restore_rng_states(rng)
    changed = other_versions(checkpoint)
    if changed:
        print(
            f"{checkpoint.name} was written with {', '.join(changed)}: the last digits may differ from an unbroken "
            "run's.",
            file=sys.stderr,
        )
    return state


def restore_optimizer(optimizer: Optimizer, scheduler: Scheduler, saved: dict[str, Any]) -> None:
    """Load moments and progress. Learning rate, betas, weight decay and schedule stay those of the options, which the
    saved state would overrule without a word."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    schedule: Any = scheduler
    peaks = schedule.base_lrs
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    schedule.base_lrs = peaks
    for group, setting, peak, factor in zip(optimizer.param_groups, settings, peaks, schedule.lr_lambdas, strict=True):
        group.update(setting)
        group["lr"] = peak * factor(scheduler.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
