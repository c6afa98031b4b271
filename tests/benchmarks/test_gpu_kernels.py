"""A step's time is put where it belongs: a recorded trace of kernels by what they are for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.kernels import GAPS, Work, device_seconds, gpu_works, group_of, head_sizes, split

RANK, VOCABULARY = 256, 32_000
HEAD = head_sizes(VOCABULARY, on_gpu=True)
GEMM = "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT"
TRACE = [
    ("dequantize", "bitsandbytes::dequantize_4bit", (), [(1,)], "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8>"),
    ("dequantize", "aten::add_", ("bitsandbytes::gemm_4bit",), [(1,)], "elementwise_kernel<4, CUDAFunctor_add>"),
    ("products of the base", "aten::mm", ("bitsandbytes::gemm_4bit",), [(4096, 6656), (6656, 17_920)], GEMM),
    ("products of the base", "aten::mm", ("_LoraLinearBackward",), [(4096, 17_920), (17_920, 6656)], "sm90_xmma_gemm"),
    ("LoRA products", "aten::mm", ("_LoraLinear",), [(4096, 6656), (6656, RANK)], GEMM),
    ("LoRA products", "aten::addmm_", (), [(4096, 6656), (4096, RANK), (RANK, 6656)], "cutlass::Kernel2<gemm>"),
    ("head products", "aten::mm", (), [(4000, 6656), (6656, 8192)], GEMM),
    ("head products", "aten::mm", (), [(4000, 6656), (6656, 32_000 % 8192)], "cublasLt::splitKreduce_kernel"),
    ("attention", "torch_attn::_varlen_attn", (), [(4096, 52, 128)], "void pytorch_flash::flash_fwd_kernel<...>"),
    ("attention", "aten::_flash_attention_backward", (), [(4096, 52, 128)], "flash_bwd_dq_dk_dv_loop_kernel"),
    ("optimizer and clipping", "bitsandbytes::optimizer_update_8bit_blockwise", (), [(9,)], "kOptimizerStatic8bit"),
    ("optimizer and clipping", "aten::mul_", ("Optimizer.step#PagedAdamW8bit.step",), [(9,)], "elementwise_kernel"),
    ("optimizer and clipping", "aten::_foreach_norm", (), [], "multi_tensor_apply_kernel<LpNormFunctor>"),
    ("copies", "aten::copy_", (), [(4096,)], "Memcpy HtoD (Pinned -> Device)"),
    ("elementwise and the rest", "aten::silu", (), [(1, 4096, 17_920)], "vectorized_elementwise_kernel<4, silu>"),
    ("elementwise and the rest", "aten::index_select", (), [(4096, 52, 128)], "indexSelectLargeIndex"),
]  # fmt: skip


@pytest.mark.parametrize(("group", "operation", "around", "shapes", "kernel"), TRACE)
def test_kernel_is_put_where_it_belongs(
    group: str, operation: str, around: tuple[str, ...], shapes: Any, kernel: str
) -> None:
    assert group_of(Work(operation, around, tuple(shapes), kernel, 0.1), RANK, HEAD) == group


def test_groups_and_gaps_add_up_to_the_step() -> None:
    works = [Work(operation, around, tuple(shapes), kernel, 0.01) for _, operation, around, shapes, kernel in TRACE]
    found = split(works, device_seconds=0.2, wall_seconds=0.25, rank=RANK, head_sizes=HEAD)
    groups = found["groups"]
    assert sum(groups.values()) == pytest.approx(0.25)
    assert groups["not attributed"] == pytest.approx(0.2 - 0.01 * len(TRACE)) and groups[GAPS] == pytest.approx(0.05)
    assert [name for name, _ in found["dearest_of_the_rest"]] == [TRACE[-2][-1], TRACE[-1][-1]]


def event(name: str, start: float = 0, end: float = 0, **values: Any) -> Any:
    defaults = {"device_type": "DeviceType.CPU", "kernels": [], "cpu_parent": None, "input_shapes": []}
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), **(defaults | values))


def test_kernels_come_with_their_operations_shapes_and_callers() -> None:
    kernel = SimpleNamespace(name="gemm", device=0, duration=7.0)
    outer = event("bitsandbytes::gemm_4bit", cpu_parent=event("_LoraLinear"))
    (work,) = gpu_works([event("aten::mm", kernels=[kernel], cpu_parent=outer, input_shapes=[[2, 3], [], [[1]]])])
    assert work == Work("aten::mm", ("bitsandbytes::gemm_4bit", "_LoraLinear"), ((2, 3), (), ()), "gemm", 7e-6)


def test_a_marked_region_is_no_kernel() -> None:
    name = "Optimizer.step#PagedAdamW8bit.step"
    region = SimpleNamespace(name=name, device=0, duration=7.0)
    assert gpu_works([event(name, kernels=[region], is_user_annotation=True)]) == []
    assert gpu_works([event("my region", kernels=[SimpleNamespace(name="my region", device=0, duration=7.0)])]) == []


def test_overlapping_kernels_count_once() -> None:
    on_gpu = {"device_type": "DeviceType.CUDA"}
    events = [event("a", 0, 10, **on_gpu), event("b", 5, 20, **on_gpu), event("c", 30, 40, **on_gpu),
              event("ProfilerStep#1", 0, 100, **on_gpu), event("aten::mm", 0, 1000)]  # fmt: skip
    assert device_seconds(events) == pytest.approx(30e-6)
