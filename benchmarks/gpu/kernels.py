"""Where a step's time goes: the profiler's kernels by what they are for.

A product is told apart by its shapes: one with the vocabulary is the head's, one with the adapter's rank is LoRA's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

GROUPS = (
    "dequantize", "products of the base", "attention", "LoRA products", "head products", "optimizer and clipping",
    "copies", "elementwise and the rest", "not attributed",
)  # fmt: skip
GAPS = "launch gaps and host"
PRODUCTS = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|wgmma|splitk|sm\d\d_.*mma|cublas", re.IGNORECASE)
PRODUCT_OPS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear"}
ATTENTION = re.compile(r"flash|fmha|attention|attn", re.IGNORECASE)
OPTIMIZER = re.compile(
    r"koptimizer|kprecondition|optimizer_update|optimizer\.step|_foreach|multi_tensor|adam", re.IGNORECASE
)
DEQUANTIZE = re.compile(r"dequantize", re.IGNORECASE)
COPIES = re.compile(r"memcpy|memset", re.IGNORECASE)


@dataclass(frozen=True)
class Work:
    """A kernel: the operation that started it with the shapes of its inputs, the operations around that one, its own
    name, and how long it ran."""

    operation: str
    around: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    kernel: str
    seconds: float


def group_of(work: Work, rank: int, head_sizes: Collection[int]) -> str:
    """What a kernel is for; `head_sizes` are the widths of the head's products."""
    everything = " ".join((work.kernel, work.operation, *work.around))
    sizes = {size for shape in work.shapes for size in shape}
    is_product = work.operation in PRODUCT_OPS or bool(PRODUCTS.search(work.kernel))
    if OPTIMIZER.search(everything):
        return "optimizer and clipping"
    if ATTENTION.search(f"{work.kernel} {work.operation}"):
        return "attention"
    if DEQUANTIZE.search(f"{work.kernel} {work.operation}"):
        return "dequantize"
    if is_product:
        of_adapter = "LoRA products" if rank in sizes else "products of the base"
        return of_adapter if sizes.isdisjoint(head_sizes) else "head products"
    if "bitsandbytes::" in everything:  # the scales of the scales
        return "dequantize"
    return "copies" if COPIES.search(work.kernel) else "elementwise and the rest"


def split(
    works: Iterable[Work], device_seconds: float, wall_seconds: float, rank: int, head_sizes: Collection[int]
) -> dict[str, Any]:
    """Seconds by group. What the device did beyond these kernels is not attributed; the rest of the wall is gaps."""
    groups = dict.fromkeys(GROUPS, 0.0)
    others: dict[str, float] = {}
    for work in works:
        group = group_of(work, rank, head_sizes)
        groups[group] += work.seconds
        if group == "elementwise and the rest":
            others[work.kernel] = others.get(work.kernel, 0.0) + work.seconds
    attributed = sum(groups.values())
    groups["not attributed"] = max(0.0, device_seconds - attributed)
    groups[GAPS] = max(0.0, wall_seconds - max(device_seconds, attributed))
    dearest = sorted(others.items(), key=lambda item: -item[1])[:12]
    shown = [[name[:120], seconds] for name, seconds in dearest]
    return {"groups": groups, "wall_seconds": wall_seconds, "dearest_of_the_rest": shown}


def profile_step(step: Callable[[], tuple[float, float]], rank: int, vocabulary: int) -> dict[str, Any]:
    """Run a step, which returns its seconds first, once as it is and once under torch's profiler; its split.

    Kernels take as long under the profiler, starting them takes longer: on a GPU the gaps are what the undisturbed step
    takes beyond the kernels.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    undisturbed, _ = step()
    with profile(activities=activities, record_shapes=True) as profiler:
        profiled, _ = step()
    events = list(profiler.events() or ())
    works = gpu_works(events) if on_gpu else cpu_works(events)
    device = device_seconds(events) if on_gpu else 0.0
    found = split(works, device, undisturbed if on_gpu else profiled, rank, head_sizes(vocabulary, on_gpu))
    return found | {"step_seconds": undisturbed, "profiled_seconds": profiled}


def head_sizes(vocabulary: int, on_gpu: bool) -> set[int]:
    """The vocabulary, and the tiles that the head cuts it into."""
    from qlora_dpo.objectives.logps import CPU_TILE, GPU_TILE

    _, tile = GPU_TILE if on_gpu else CPU_TILE
    return {vocabulary, tile, vocabulary % tile} - {0}


def device_seconds(events: Iterable[Any]) -> float:
    """Seconds in which the GPU ran something; work that overlaps counts once."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if "CUDA" in str(event.device_type) and not is_range(event)
    )
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6


def is_range(event: Any) -> bool:
    """Whether the event marks a region of the program on the device's time line, and is no work itself."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(("Optimizer.", "ProfilerStep"))


def gpu_works(events: Iterable[Any]) -> list[Work]:
    """The kernels that the profiler ties to operations; a marked region comes back as a kernel of its own name."""
    return [
        Work(event.name, around(event), shapes_of(event), kernel.name, kernel.duration / 1e6)
        for event in events
        for kernel in event.kernels
        if kernel.name != event.name and not is_range(event)
    ]


def cpu_works(events: Iterable[Any]) -> list[Work]:
    """Operations of a CPU with the time that they spend themselves."""
    return [
        Work(event.name, around(event), shapes_of(event), event.name, event.self_cpu_time_total / 1e6)
        for event in events
        if event.name.startswith(("aten::", "bitsandbytes::"))
    ]


def around(event: Any) -> tuple[str, ...]:
    """The names of the operations that called this one."""
    names, parent = [], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    return tuple(names)


def shapes_of(event: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of the operation's tensors."""
    shapes = getattr(event, "input_shapes", None) or []
    return tuple(tuple(size for size in shape if isinstance(size, int)) for shape in shapes if isinstance(shape, list))
