"""Attention over a packed row in which the two completions of a pair share their prompt.

Registered with transformers as `prefix_shared`. Without a layout it is plain SDPA, masks included, so generation and
padded batches work as always. With one, each segment attends to its prefix and causally to itself (lower-right
causal); a sliding window counts over prefix and segment together, as positions do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_dpo.data.packing import PackedLayout

IMPLEMENTATION = "prefix_shared"


def register() -> None:
    """Make `attn_implementation="prefix_shared"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, prefix_shared_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@dataclass
class CallCount:
    """Attention calls that saw a layout."""

    count: int = 0


_counters: list[CallCount] = []


@contextmanager
def counted_calls() -> Iterator[CallCount]:
    """Count the attention calls with a layout within this block."""
    counter = CallCount()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def prefix_shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    prefix_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; query [1, H, T, D], key and value [1, Hkv, T, D], result [1, T, H, D].

    Raises:
        NotImplementedError: for a packed row when the layer asks for something that segments cannot honor
            (soft cap, attention sinks, position bias, dropout); the startup self-check then falls back.
    """
    if prefix_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    for counter in _counters:
        counter.count += 1
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unsupported or dropout:
        raise NotImplementedError(f"a packed row with {unsupported or 'attention dropout'}")
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (T, H, D) each
    varlen = _varlen_attn() if query.is_cuda and query.dtype != torch.float32 else None
    kernel = varlen or _sdpa_by_segment
    return attend(rows[0], rows[1], rows[2], prefix_layout, scaling, sliding_window, kernel)[None], None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    window: int | None,
    kernel: Callable[..., Tensor],
) -> Tensor:
    """Attention of a packed row, [T, H, D]: keys and values are gathered so that each segment has its prefix before
    it, then `kernel` (with the signature of torch's `varlen_attn`) attends lower-right causally."""
    keys, values = (_GatherRows.apply(rows, layout) for rows in (key, value))  # type: ignore[no-untyped-call]
    attended: Tensor = kernel(
        query, keys, values, layout.cu_seq_q, layout.cu_seq_k, layout.max_q, layout.max_k,
        scale=scaling, window_size=(-1 if window is None else window - 1, 0),
    )  # fmt: skip
    return attended


def _sdpa_by_segment(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, _max_q: int, _max_k: int, *,
    scale: float | None, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """`varlen_attn` by one SDPA call per segment: on every device and in every type, without a T x T mask."""
    # Splits, not slices: the backward of a slice fills a zero tensor of the whole row for every segment.
    lengths = [cu.diff().tolist() for cu in (cu_q, cu_k)]
    pieces = zip(
        torch.split(query, lengths[0]), torch.split(key, lengths[1]), torch.split(value, lengths[1]), strict=True
    )
    return torch.cat([_sdpa(*piece, scale, window_size[0]) for piece in pieces])


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float | None, back: int) -> Tensor:
    """One segment [Q, H, D] over its prefix and itself [K, Hkv, D]; a window reaches `back` keys back, -1 is all."""
    mask = _segment_mask(len(query), len(key), back, query.device)
    query, key, value = (rows.transpose(0, 1)[None] for rows in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if not query.is_cuda and query.dtype == torch.bfloat16:
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
        attended: Tensor = _FlashOnCpu.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    else:
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )
    return attended[0].transpose(0, 1)


class _FlashOnCpu(torch.autograd.Function):
    """SDPA's kernel for CPUs in bf16 with its backward pass in fp32, which is both faster there and more precise.

    query, key, value [1, H, Q or K, D]; mask [Q, K] or None for causal.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
    ) -> Tensor:
        bias = None if mask is None else torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor
        output, logsumexp = flash(query, key, value, 0.0, mask is None, attn_mask=bias, scale=scale)
        ctx.save_for_backward(query, key, value, output, logsumexp, bias)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, bias = ctx.saved_tensors
        wide = [tensor.float() for tensor in (grads[0], query, key, value, output)]
        bias = None if bias is None else bias.float()
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        pulls = backward(*wide, logsumexp, 0.0, bias is None, attn_mask=bias, scale=ctx.scale)
        return *(pull.to(query.dtype) for pull in pulls), None, None


def _segment_mask(queries: int, keys: int, back: int, device: torch.device) -> Tensor | None:
    """Lower-right causal mask [queries, keys], or None where SDPA's own causal flag says the same."""
    if queries == keys and not 0 <= back < keys - 1:
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    mask = distance >= 0
    return mask if back < 0 else mask & (distance <= back)


class _GatherRows(torch.autograd.Function):
    """`rows[key_index]` whose backward adds each shared prompt's second copy once, without atomics."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: PackedLayout) -> Tensor:
        ctx.layout = layout
        return rows.index_select(0, layout.key_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        layout: PackedLayout = ctx.layout
        own, shared, position = [], [], 0
        for segment in layout.segments:
            shared.append((segment, position))
            position += segment.prefix_length
            own.append(grad[position : position + segment.length])
            position += segment.length
        result = torch.cat(own)
        for segment, start in shared:
            if segment.prefix_length:
                prefix = slice(segment.prefix_start, segment.prefix_start + segment.prefix_length)
                result[prefix] += grad[start : start + segment.prefix_length]
        return result, None


@cache
def _varlen_attn() -> Callable[..., Tensor] | None:
    """torch's variable-length attention with `scale` and `window_size`, or None where this torch lacks them."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    call: Callable[..., Tensor] = varlen_attn  # type: ignore[assignment]  # a tuple only where aux output is asked for
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(parameters):
        return None
    if "enable_gqa" in parameters:

        def grouped(query: Tensor, key: Tensor, value: Tensor, *sizes: Any, **options: Any) -> Tensor:
            return call(query, key, value, *sizes, enable_gqa=key.shape[1] != query.shape[1], **options)

        return grouped

    def repeated(query: Tensor, key: Tensor, value: Tensor, *sizes: Any, **options: Any) -> Tensor:
        copies = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(copies, dim=1) for tensor in (key, value))
        return call(query, key, value, *sizes, **options)

    return repeated
