"""The attention of a packed row on this device against attention written out: scores, mask, softmax, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.ours import device_here
from benchmarks.gpu.rows import Row
from benchmarks.gpu.scale import SCALES, SEED
from qlora_dpo.data.packing import PackedLayout, Segment, pack
from qlora_dpo.data.tokenization import TokenizedPair
from qlora_dpo.models import attention

LARGEST_ERROR = 2e-2  # relative, of bf16 against float64
OVER_PLAIN = 2.0  # times the error of plain SDPA in bf16 is allowed too


@dataclass(frozen=True)
class Case:
    """Heads of queries and of keys, their size, and the window."""

    name: str
    heads: int = 8
    kv_heads: int = 8
    size: int = 128
    window: int | None = None


CASES = (
    Case("lower-right causal"), Case("grouped queries", kv_heads=2), Case("sliding window", window=100),
    Case("grouped queries and window", kv_heads=2, window=100), Case("head size 64", size=64),
)  # fmt: skip


def measure_attention(scale_name: str) -> Iterator[Row]:
    """Output and gradients of every case; the kernel is the one that training uses here."""
    tokens = SCALES[scale_name].attention_tokens
    for case in CASES:
        yield check(case, tokens)


def check(case: Case, tokens: int) -> Row:
    """The largest relative error of output and gradients, beside plain SDPA's own."""
    device = device_here()
    lengths = ((tokens // 2, tokens // 2, tokens // 4), (5, tokens // 3, 3), (tokens // 4, 2, tokens // 2))
    pairs = [TokenizedPair([3] * prompt, [4] * chosen, [5] * rejected) for prompt, chosen, rejected in lengths]
    layout = pack(pairs, "shared").to(device).layout
    assert layout is not None
    varlen = attention._varlen_attn() if device.type == "cuda" else None
    states = make_states(case, int(layout.cu_seq_q[-1]), device)
    kernel = varlen or attention._sdpa_by_segment
    scale = case.size**-0.5
    ours = gradients(states, lambda q, k, v: attention.attend(q, k, v, layout, scale, case.window, kernel))
    exact = gradients([state.double() for state in states], lambda q, k, v: written_out(q, k, v, layout, case.window))
    plain = gradients(states, lambda q, k, v: by_sdpa(q, k, v, layout, case.window))
    errors, floor = [relative(found, exact) for found in (ours, plain)]
    passed = all(one <= max(LARGEST_ERROR, OVER_PLAIN * other) for one, other in zip(errors, floor, strict=True))
    values = {
        "passed": passed,
        "found": f"{max(errors):.1e} (output, dq, dk, dv: {', '.join(f'{error:.1e}' for error in errors)})",
        "limit": f"{LARGEST_ERROR:g}; plain SDPA {max(floor):.1e}",
        "how": "torch's varlen_attn" if varlen is not None else "SDPA by segment",
    }
    return Row("checks", f"attention: {case.name}", values)


def make_states(case: Case, tokens: int, device: torch.device) -> list[Tensor]:
    """Query, key and value [T, H, D] in bf16."""
    torch.manual_seed(SEED)
    heads = (case.heads, case.kv_heads, case.kv_heads)
    return [torch.randn(tokens, count, case.size, device=device).bfloat16() for count in heads]


def gradients(states: list[Tensor], attend: object) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it by query, key and value, all in float64."""
    leaves = [state.detach().clone().requires_grad_() for state in states]
    output: Tensor = attend(*leaves)  # type: ignore[operator]
    weights = torch.linspace(-1, 1, output.numel(), device=output.device).bfloat16().to(output.dtype).view_as(output)
    found = torch.autograd.grad((output * weights).sum(), leaves)
    return [tensor.detach().double() for tensor in (output, *found)]


def relative(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The distance of each tensor from the exact one by that one's length."""
    return [((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]


def segments(query: Tensor, key: Tensor, value: Tensor, segment: Segment) -> list[Tensor]:
    """Query, key and value of a segment, [H, Q or K, D], its prefix in front of its keys."""
    own = slice(segment.start, segment.start + segment.length)
    prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix_length)
    keys, values = (torch.cat([rows[prefix], rows[own]]) for rows in (key, value))
    copies = query.shape[1] // key.shape[1]
    keys, values = (rows.repeat_interleave(copies, dim=1) for rows in (keys, values))
    return [rows.transpose(0, 1) for rows in (query[own], keys, values)]


def mask_of(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys a query sees: the last query sees all, each one before it one fewer, none beyond the window."""
    back = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (back >= 0) & (back < (window or keys))


def written_out(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """Attention by its definition, segment by segment, [T, H, D]."""
    outputs = []
    for segment in layout.segments:
        q, k, v = segments(query, key, value, segment)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        seen = mask_of(q.shape[1], k.shape[1], window, q.device)
        outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, window: int | None) -> Tensor:
    """The same by torch's plain SDPA with a mask."""
    outputs = []
    for segment in layout.segments:
        q, k, v = segments(query, key, value, segment)
        seen = mask_of(q.shape[1], k.shape[1], window, q.device)
        outputs.append(F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen)[0].transpose(0, 1))
    return torch.cat(outputs)
