"""The device's memory: how much there is, and how work goes on in smaller micro-batches where it runs out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from qlora_dpo.training.engine import Engine
from qlora_dpo.training.folder.checkpoints import restore_rng_states

T = TypeVar("T")


class DeviceMemory(Protocol):
    """What can be read from a device that knows its memory; all numbers are bytes."""

    def start(self) -> None:
        """Give back what is only cached, and count from here."""

    def grown(self) -> int:
        """The most that was held at once since `start`, beyond what was held then."""

    def free(self) -> int:
        """What can still be had."""


class CudaMemory:
    """Memory of one GPU, as torch's allocator and the driver count it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held = 0

    def start(self) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._held = torch.cuda.memory_allocated(self._device)

    def grown(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._held

    def free(self) -> int:
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + cached


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU; None for a CPU, which has no such counters."""
    return CudaMemory(device) if device.type == "cuda" else None


def within_memory(engine: Engine, indices: Sequence[int], rng: dict[str, Any], work: Callable[[], T]) -> T:
    """The result of `work` on these pairs; where memory runs out it is undone and repeated with half the token budget.

    The repetition starts from the random states `rng`, so its result is that of a run that always had this budget.
    Where memory runs out in one process, all repeat.

    Raises:
        torch.OutOfMemoryError: a pair does not fit even alone; or the base is sharded, where nothing can be repeated.
    """
    if engine.ranks.is_sharded:
        return work()
    unknown = engine.reference.unknown(engine.own(indices))
    while True:
        # Not an except block: in there the error's traceback would still hold the graph of what failed.
        with suppress(torch.OutOfMemoryError):
            return work()
        engine.model.zero_grad(set_to_none=True)
        engine.reference.forget(unknown)
        restore_rng_states(rng)
        halve_budget(engine, engine.all_micro_batches(indices))


def halve_budget(engine: Engine, failed: Sequence[Sequence[int]]) -> None:
    """Lower the engine's token budget, because one of these micro-batches did not fit.

    Raises:
        torch.OutOfMemoryError: they cannot be cut further.
    """
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    dearest = max(engine.cost(members) for members in failed)
    indivisible = max(engine.cost(group) for members in failed for group in engine.groups(members))
    if dearest <= indivisible:
        raise torch.OutOfMemoryError(f"{indivisible} tokens do not fit, and no smaller part can be computed alone")
    engine.max_tokens = max(dearest // 2, indivisible)
    tqdm.write(
        f"out of memory: from here on at most {engine.max_tokens} tokens go through the model at once (was {dearest}); "
        "the same work is repeated",
        file=sys.stderr,
    )
