"""Learning rates are those of transformers after the warmup, and no step of the warmup is lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_dpo.training.optimizers import DECAYS, make_scheduler

STEPS, PEAK = 20, 1e-3


def rates(scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int = STEPS) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=PEAK)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("name", DECAYS)
def test_after_the_warmup_the_rates_are_those_of_transformers(name: str, warmup: int) -> None:
    from transformers import get_scheduler

    ours = rates(make_scheduler(name, optimizer(), warmup_ratio=warmup / STEPS, total_steps=STEPS))
    theirs = rates(get_scheduler(name, optimizer(), num_warmup_steps=warmup, num_training_steps=STEPS))
    start = 0 if name == "constant" else warmup
    assert ours[start:] == pytest.approx(theirs[start:], abs=1e-12)
    assert ours[start] == PEAK


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_every_step_trains_and_the_warmup_rises_evenly(name: str, steps: int) -> None:
    found = rates(make_scheduler(name, optimizer(), warmup_ratio=0.5, total_steps=steps), steps)
    assert min(found) > 0
    if name != "constant" and steps == 20:
        assert found[:11] == pytest.approx([PEAK * step / 11 for step in range(1, 12)])
