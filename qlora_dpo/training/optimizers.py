"""Optimizers by the names of `transformers.TrainingArguments.optim`, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from qlora_dpo.errors import UsageError


def make_optimizer(
    name: str, parameters: Sequence[nn.Parameter], device: torch.device, **settings: Any
) -> torch.optim.Optimizer:
    """Build the optimizer; `settings` are lr, betas, eps, weight_decay.

    Raises:
        UsageError: a bitsandbytes optimizer on a CPU.
    """
    return _optimizer_class(name, device)(parameters, **settings)


def make_loraplus_optimizer(
    name: str, model: Any, device: torch.device, *, ratio: float, weight_decay: float, **settings: Any
) -> torch.optim.Optimizer:
    """The same with groups of their own for A and B: the learning rate of B is `ratio` times `lr`, as PEFT has it.

    Raises:
        UsageError: a bitsandbytes optimizer on a CPU.
    """
    from peft.optimizers import create_loraplus_optimizer

    made: Any = _optimizer_class(name, device)
    return create_loraplus_optimizer(
        model, made, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay, **settings
    )


def _optimizer_class(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    name = optimizer_name(name, device.type)
    if name != "adamw_torch" and device.type == "cpu":
        raise UsageError(f"--optim {name} needs a GPU: on a CPU use adamw_torch (or auto, which picks it).")
    return OPTIMIZERS[name]


def optimizer_name(name: str, device_type: str) -> str:
    """The optimizer that `auto` stands for on such a device; any other name as it is."""
    if name != "auto":
        return name
    return "paged_adamw_8bit" if device_type == "cuda" else "adamw_torch"


def make_scheduler(
    name: str, optimizer: torch.optim.Optimizer, *, warmup_ratio: float, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """transformers' learning-rate schedule of that name, but for the warmup: there it starts at 0, which wastes the
    first step and trains nothing in a run of one. Here step n of W has the share n / (W + 1), as in nanoGPT."""
    warmup = 0 if name == "constant" else math.ceil(warmup_ratio * total_steps)

    def share(done: int) -> float:
        if done < warmup:
            return (done + 1) / (warmup + 1)
        return DECAYS[name]((done - warmup) / max(1, total_steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "constant_with_warmup": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
"""Share of the peak that is left when this share of the steps after the warmup is done."""


def _bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    def make(parameters: Sequence[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
        import bitsandbytes

        optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, name)(parameters, **settings)
        return optimizer

    return make


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw_torch": torch.optim.AdamW,
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
    "paged_adamw_32bit": _bitsandbytes("PagedAdamW32bit"),
}
