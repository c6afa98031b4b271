"""A LoRA linear layer as one differentiable step, on PEFT's own modules.

PEFT computes `base(x).clone() + lora_B(lora_A(dropout(x))) * scaling` in six tensors, in the adapter's fp32. Here the
adapter's fp32 weights are cast to the activations' type for the products (as autocast would), the sum is one `addmm`,
and backward keeps only the input, which the layers that read the same input share, and the [T, r] product:

    a = x A^T,   y = base(x) + s a B^T                                        (arXiv 2106.09685, section 4.1)
    dB = s dy^T a,   da = s dy B,   dA = da^T x,   dx = dy W + da A
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack

from qlora_dpo.models.lora import POLICY


def fuse_lora(model: nn.Module) -> int:
    """Replace the forward of every plain LoRA layer of the policy; returns how many were replaced.

    Layers in 8 bit, with dropout, DoRA or another variant keep PEFT's forward. Parameters, names and saving are PEFT's.
    """
    from peft.tuners.lora import LoraLayer

    fused = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_plain(module):
            module.forward = partial(_forward, module, module.forward)
            fused += 1
    return fused


def _is_plain(layer: Any) -> bool:
    from bitsandbytes.nn import Linear8bitLt

    base = layer.get_base_layer()
    is_linear = isinstance(base, nn.Linear) and not isinstance(base, Linear8bitLt)  # Linear4bit derives from Linear
    has_dropout = any(not isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
    has_bias = any(layer.lora_bias.values())
    return is_linear and POLICY in layer.lora_A and not (has_dropout or has_bias or layer.lora_variant)


def _forward(layer: Any, peft_forward: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's forward: fused where exactly one adapter is active and nothing is merged."""
    if layer.disable_adapters or layer.merged or args or kwargs or len(layer.active_adapters) != 1:
        result: Tensor = peft_forward(x, *args, **kwargs)
        return result
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    output: Tensor = _LoraLinear.apply(x, a, b, layer.get_base_layer(), layer.scaling[name])
    return output.view(*x.shape[:-1], -1)  # out here: autograd forbids writing into a view made within a Function


class _LoraLinear(torch.autograd.Function):
    """y = base(x) + scaling * (x A^T) B^T with a frozen base; x [..., H], A [r, H], B [O, r], y [T, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, base: nn.Module, scaling: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.to(x.dtype).T  # (T, r)
        output = _add_product(base(rows), low, b.to(x.dtype).T, scaling)
        ctx.save_for_backward(rows, low, a, b)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        rows, low, a, b = ctx.saved_tensors
        (grad,) = grads
        grad_low = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)  # (T, r)
        grad_b = (grad.T @ low).to(b.dtype).mul_(ctx.scaling)
        grad_a = (grad_low.T @ rows).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_weight(ctx.base, grad.dtype)
            grad_x = grad_x.addmm_(grad_low, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None


def _add_product(base: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """`base + scaling * left @ right`, in place unless selective checkpointing may have kept `base` itself."""
    if _len_torch_dispatch_stack():
        return torch.addmm(base, left, right, alpha=scaling)
    return base.addmm_(left, right, alpha=scaling)


def dense_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The frozen layer's weight [O, H] in `dtype`, dequantized where it is in 4 bit."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    with getattr(layer, "gathered", nullcontext)():  # ZeRO-3 holds a part of it
        if isinstance(layer, Linear4bit):
            packed: Any = layer.weight
            state = getattr(packed, "quant_state", None) or layer.quant_state  # FSDP gathers the bytes alone
            weight: Tensor = dequantize_4bit(packed.data, state)
        else:
            weight = layer.weight.data
    return weight.to(dtype)
