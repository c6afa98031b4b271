"""The rates that this card reaches at all: a large copy, a large product, dequantization."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.child import synchronize
from benchmarks.gpu.ours import device_here
from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import SEED

TRIES, TIMES = 5, 4


def measure_ceilings(side: int) -> Iterator[Row]:
    """Medians of a few tries, on random values."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = device_here()
    torch.manual_seed(SEED)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    taken = median_seconds(lambda: left @ right)
    yield Row("ceilings", f"bf16 product, {side} x {side} x {side}", rate(2 * side**3 / taken / 1e12, "TFLOP/s"))
    large = torch.randn(4 * side, side, device=device)
    taken = median_seconds(large.clone)
    yield Row("ceilings", "copy on the device, read and written", rate(2 * large.nbytes / taken / 1e9, "GB/s"))
    packed, state = quantize_4bit(large.bfloat16(), quant_type="nf4", compress_statistics=True)
    taken = median_seconds(lambda: dequantize_4bit(packed, state))
    moved = packed.nbytes + 2 * large.numel() + large.numel() // 64
    yield Row("ceilings", "NF4 with double quantization to bf16", rate(moved / taken / 1e9, "GB/s"))
    small = torch.ones(16, device=device)
    taken = median_seconds(lambda: [small.add(1.0) for _ in range(1000)])
    yield Row("ceilings", "1,000 small operations, one after the other", rate(taken / 1000 * 1e6, "µs each"))


def rate(number: float, unit: str) -> dict[str, object]:
    """A row's values."""
    return {"rate": number, "unit": unit}


def median_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call, the median over tries of a few calls each, warmed up."""
    call()
    found = []
    for _ in range(TRIES):
        started = synchronize()
        for _ in range(TIMES):
            call()
        found.append((synchronize() - started) / TIMES)
    return statistics.median(found)
