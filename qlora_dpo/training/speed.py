"""How long training takes: floating-point operations counted, and a rate at which a device does them. An estimate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_dpo.models.activation_checkpointing import Level
from qlora_dpo.models.skeleton import Skeleton
from qlora_dpo.training.schedule import Schedule

UTILIZATION = 0.4  # of a card's dense peak: attention, norms, dequantization and launches take the rest
CPU_UTILIZATION = 0.2  # of one matrix product's rate: dequantization and everything small are slower there
# Dense bf16 TFLOP/s with fp32 sums, from the makers' data sheets; the first name found in the device's name counts.
CARDS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 6000 Ada": 364.0,
    "RTX 5090": 210.0,
    "RTX 4090": 165.0,
    "RTX A6000": 155.0,
    "A40": 150.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 3090": 71.0,
    "L4": 121.0,
}
SHOWN = ("H100", "A100", "RTX 4090")  # where the run is planned for another machine
MATMUL_SECONDS = 0.3


@dataclass(frozen=True)
class Work:
    """Tokens of a run: trained on, scored by the reference, evaluated; and the predicted (completion) ones of each."""

    trained: float
    reference: float
    evaluated: float
    trained_targets: float
    reference_targets: float
    evaluated_targets: float


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of a run, by what is done with it."""

    trained: float
    reference: float
    evaluated: float
    target_trained: float
    target_scored: float

    def total(self, work: Work) -> float:
        """Operations of the whole run."""
        return (
            self.training(work)
            + work.reference * self.reference
            + work.evaluated * self.evaluated
            + (work.reference_targets + work.evaluated_targets) * self.target_scored
        )

    def training(self, work: Work) -> float:
        """Operations of the policy's forward and backward passes."""
        return work.trained * self.trained + work.trained_targets * self.target_trained


def work_of_run(
    costs: NDArray[np.int64], targets: NDArray[np.int64], *, schedule: Schedule, held_out: int, eval_steps: int,
    distinct: int | None = None, has_reference: bool = True,
) -> Work:  # fmt: skip
    """Tokens of a run whose epoch has pairs of these costs and predicted tokens, each an array [pairs]: every step's
    pairs, the reference once per pair (of which there are `distinct`), and every evaluation."""
    steps = schedule.total_steps
    epochs = schedule.epoch(steps)
    scored = has_reference * (min(distinct or len(costs), steps * schedule.pairs_per_step) + held_out)
    evaluated = -(-steps // eval_steps) * held_out
    mean, mean_targets = float(costs.mean()), float(targets.mean())
    return Work(
        trained=epochs * float(costs.sum()),
        reference=scored * mean,
        evaluated=evaluated * mean,
        trained_targets=epochs * float(targets.sum()),
        reference_targets=scored * mean_targets,
        evaluated_targets=evaluated * mean_targets,
    )


def count_flops(skeleton: Skeleton, levels: Sequence[Level], in_4_bit: bool) -> Flops:
    """Per token, with N weights, A adapter parameters and a head of V: forward 2 (N + A), backward 2 N + 4 A, again
    what the level recomputes; reference 2 N; per predicted token 4 V to train, 2 V to score."""
    weights, adapter, head = skeleton.weights.active_parameters, skeleton.adapter_parameters, skeleton.weights
    forward = 2.0 * (weights + adapter)
    selective = 2.0 * adapter if in_4_bit else forward  # only 4-bit products are kept
    again = {"none": 0.0, "selective": selective, "full": forward, "offload": forward}
    recomputed = sum(again[level] for level in levels) / len(levels)
    return Flops(
        trained=forward + recomputed + 2.0 * weights + 4.0 * adapter,
        reference=2.0 * weights,
        evaluated=forward,
        target_trained=4.0 * head.head_parameters,
        target_scored=2.0 * head.head_parameters,
    )


def card_rate(name: str) -> tuple[str, float] | None:
    """A device's entry in `CARDS` and the FLOP/s that training is assumed to reach on it, or None where it has none."""
    found = next((card for card in CARDS if card.lower() in name.lower()), None)
    return None if found is None else (found, UTILIZATION * CARDS[found] * 1e12)


def rates(device: torch.device | None, dtype: torch.dtype) -> list[tuple[str, float]]:
    """FLOP/s of training with their origin: this device's, or some well-known cards' where there is no device."""
    if device is None:
        cards = [card_rate(name) for name in SHOWN]
    else:
        cards = [card_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None]
    known = [(f"on {card[0]} at {UTILIZATION:.0%} of its peak", card[1]) for card in cards if card is not None]
    if known or device is None:
        return known
    share = UTILIZATION if device.type == "cuda" else CPU_UTILIZATION
    product = product_rate(device, dtype)
    return [(f"here, at {share:.0%} of the {product / 1e12:.2g} TFLOP/s of a matrix product", share * product)]


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one matrix product on this device now."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    torch.mm(left, right)
    runs, started = 0, _now(device)
    while runs < 3 or (_now(device) - started < MATMUL_SECONDS and runs < 100):
        torch.mm(left, right)
        runs += 1
    return 2 * size**3 * runs / (_now(device) - started)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
