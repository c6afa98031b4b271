"""Continuing a run: from which checkpoint, and what of it holds although an option was allowed to change."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.models.lora import restore_adapter, trainable_parameters
from qlora_dpo.training.folder.checkpoints import (
    clear_leftovers,
    load_state,
    newest_valid,
    other_versions,
    restore_rng_states,
)
from qlora_dpo.training.folder.run_folder import SAMPLES, RunFolder
from qlora_dpo.training.parallel.ranks import ALONE, Ranks
from qlora_dpo.training.records.tracking import cut_back

Optimizer = torch.optim.Optimizer
Scheduler = torch.optim.lr_scheduler.LRScheduler


def resume(
    run: RunFolder, model: Any, optimizer: Optimizer, scheduler: Scheduler, total_steps: int, ranks: Ranks = ALONE
) -> dict[str, Any] | None:
    """Restore the newest valid checkpoint and cut the records back to it; returns its trainer state, if there is one.

    Raises:
        ModelError, UsageError: it does not fit the options of this run.
        StorageError: the records cannot be cut back, or a process does not see the checkpoint.
    """
    checkpoint = ranks.on_main(lambda: _find(run))
    state = None
    if checkpoint is not None:
        state = _restore(checkpoint, model, optimizer, scheduler, ranks)
        print(f"Continuing from {checkpoint.name} of {total_steps} steps.", file=sys.stderr)
    step = int(state["step"]) if state else 0
    ranks.on_main(lambda: _cut_back(run, step))
    return state


def _find(run: RunFolder) -> Path | None:
    clear_leftovers(run.path)
    checkpoint, rejected = newest_valid(run.path)
    for reason in rejected:
        print(reason, file=sys.stderr)
    return checkpoint


def _cut_back(run: RunFolder, step: int) -> None:
    cut_back(run.metrics, step)
    if (run.path / SAMPLES).is_file():
        cut_back(run.path / SAMPLES, step)


def _restore(checkpoint: Path, model: Any, optimizer: Optimizer, scheduler: Scheduler, ranks: Ranks) -> dict[str, Any]:
    try:
        moments, rng, state = load_state(checkpoint)
    except FileNotFoundError as error:  # on another machine
        raise StorageError(
            f"{checkpoint} is not there for process {ranks.rank}: --output_dir must lie on a file system that all "
            "machines of the run share."
        ) from error
    kind, asked = state.get("optimizer"), type(optimizer).__name__
    if kind not in (None, asked):
        raise UsageError(
            f"{checkpoint} was written with the optimizer {kind}, and here it would be {asked}: --optim auto depends "
            "on the device. Continue on such a device as before, or start anew with --fresh."
        )
    try:
        if ranks.shards_adapter:
            moments = _restore_sharded(checkpoint, model, moments)
        else:
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
    restore_rng_states(own_rng_states(rng, ranks, state["step"]))
    changed = other_versions(checkpoint)
    if changed:
        print(
            f"{checkpoint.name} was written with {', '.join(changed)}: the last digits may differ from an unbroken "
            "run's.",
            file=sys.stderr,
        )
    return state


def _restore_sharded(checkpoint: Path, model: Any, moments: dict[str, Any]) -> dict[str, Any]:
    """Load the adapter's weights; returns the moments, sharded as the adapter is."""
    from safetensors.torch import load_file

    from qlora_dpo.training.parallel import fsdp

    fsdp.restore_adapter(model, load_file(checkpoint / "adapter_model.safetensors"))
    return moments | {"optimizer": fsdp.sharded_moments(moments["optimizer"], trainable_parameters(model))}


def own_rng_states(saved: dict[str, Any], ranks: Ranks, step: int) -> dict[str, Any]:
    """This process's random states among those of a checkpoint; where another number of processes wrote them, all but
    the first process draw anew, each from numbers of its own."""
    everyone = [saved, *saved.get("others", [])]
    if len(everyone) == ranks.count:
        return everyone[ranks.rank]
    print(
        f"{len(everyone)} processes wrote the checkpoint and {ranks.count} continue: the same pairs in the same steps, "
        "but dropout draws other numbers and the last digits may differ.",
        file=sys.stderr,
    )
    return saved if ranks.is_main else reseeded(saved, ranks.rank + 1_000_003 * (step + 1))


def reseeded(states: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same random states with torch's, from which dropout draws, started from a seed."""
    return states | {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "cuda": [torch.Generator("cuda").manual_seed(seed).get_state() for _ in states["cuda"]],
    }


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
