"""RMS norms and rotary positions that pass over memory fewer times than transformers' and keep less for backward.

Only the frozen base's own modules are changed, on the instances, and only where a probe shows the same result:

    RMSNorm   y = x r g,  r = 1 / sqrt(mean(x^2) + eps),  dx = r (u - x r mean(u x r)),  u = dy g  (arXiv 1910.07467)
    rotary    y = x cos + rotate_half(x) sin; backward turns the other way                         (arXiv 2104.09864)

The norm keeps its input, which the residual stream keeps anyway, and one number per row, where autograd keeps two
more copies in fp32. The product with the gain is formed in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU_ELEMENTS = 2**16  # of a block of rows, so that its fp32 temporaries stay in the cache
_ROTARY = "apply_rotary_pos_emb"

Rotate = Callable[..., tuple[Tensor, Tensor]]


def make_lean(model: nn.Module) -> tuple[int, int]:
    """Replace what can be replaced; returns the numbers of norms and of attention layers."""
    norms = sum(_replace_norm(module) for module in model.modules())
    rotaries = sum(_replace_rotary(module) for module in model.modules())
    return norms, rotaries


def _replace_norm(module: Any) -> bool:
    gain = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or gain is None or gain.requires_grad or not eps:
        return False
    offset = 1.0 if "Gemma" in type(module).__name__ else 0.0  # Gemma's gain is 1 + weight
    lean = partial(_norm, gain, float(eps), offset)
    if gain.is_meta or _agrees(module, lean, gain):
        module.forward = lean
        return True
    return False


def _agrees(module: nn.Module, lean: Callable[[Tensor], Tensor], gain: Tensor) -> bool:
    probe = torch.linspace(-3, 3, 2 * len(gain), device=gain.device).view(2, -1)
    with torch.no_grad():
        return torch.allclose(module(probe).float(), lean(probe).float(), atol=1e-5, rtol=1e-5)


def _norm(gain: Tensor, eps: float, offset: float, x: Tensor) -> Tensor:
    """The norm of rows x [..., H]."""
    if x.is_cuda and not offset and x.dtype == gain.dtype:
        return F.rms_norm(x, (x.shape[-1],), gain, eps)  # one kernel each way
    output: Tensor = _RMSNorm.apply(x, gain, eps, offset)
    return output.view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, offset: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_gain = gain.to(wide) + offset
        scale = torch.empty(len(rows), 1, dtype=wide, device=x.device)
        output = torch.empty_like(rows)
        for block in _row_blocks(rows):
            values = rows[block].to(wide, copy=True)
            mean = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(rows.shape[-1])
            scale[block] = mean.add_(eps).rsqrt_()
            output[block] = values.mul_(scale[block]).mul_(wide_gain)
        ctx.save_for_backward(rows, scale, wide_gain)
        ctx.shape = x.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, scale, gain = ctx.saved_tensors
        (grad,) = grads
        result = torch.empty_like(rows)
        for block in _row_blocks(rows):
            pull = grad[block] * gain
            unit = rows[block].to(gain.dtype, copy=True).mul_(scale[block])
            along = torch.linalg.vecdot(pull, unit).div_(rows.shape[-1])[:, None]
            result[block] = pull.sub_(unit.mul_(along)).mul_(scale[block])
        return result.view(ctx.shape), None, None, None


def _row_blocks(rows: Tensor) -> Iterator[slice]:
    step = max(1, CPU_ELEMENTS // rows.shape[-1]) if rows.device.type == "cpu" else len(rows)
    return (slice(start, start + step) for start in range(0, len(rows), step))


def _replace_rotary(module: Any) -> bool:
    """Give this attention layer's forward a lean rotation in place of the one that its module file names."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    own: Rotate | None = forward.__globals__.get(_ROTARY)
    if own is None or not _rotates_halves(own):
        return False
    # A copy of the function that looks the rotation up elsewhere: transformers' own module is left alone.
    names = forward.__globals__ | {_ROTARY: partial(_rotate, own)}
    lean = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    lean.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(lean, module)
    return True


def _rotates_halves(own: Rotate) -> bool:
    query, key, angles = (torch.linspace(low, 2, 24).view(shape) for low, shape in
                          ((-1, (1, 2, 3, 4)), (0, (1, 2, 3, 4)), (-2, (2, 1, 3, 4))))  # fmt: skip
    try:
        expected = own(query, key, angles[0], angles[1])
    except (TypeError, RuntimeError, ValueError):
        return False
    found = _Rotate.apply(query, key, angles[0][:, None], angles[1][:, None])
    return all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(found, expected, strict=True))


def _rotate(own: Rotate, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    """query, key [B, H, T, D] by cos, sin [B, T, D] of their type; anything else is the model's own affair (OLMo 2
    rotates in fp32)."""
    is_plain = query.shape[-1] == key.shape[-1] == cos.shape[-1] and cos.ndim == 3 and cos.dtype == query.dtype
    if args or kwargs or not is_plain:
        return own(query, key, cos, sin, *args, **kwargs)
    return _Rotate.apply(query, key, cos[:, None], sin[:, None])


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _turned(query, cos, sin), _turned(key, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # rotate_half's transpose is its negative, and takes each sine from the half that it came from.
        swapped = torch.cat(sin.chunk(2, -1)[::-1], -1).neg_()
        return _turned(grads[0], cos, swapped), _turned(grads[1], cos, swapped), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin."""
    output = x * cos
    for (half, other), sign in (((0, 1), -1), ((1, 0), 1)):
        output.chunk(2, -1)[half].addcmul_(x.chunk(2, -1)[other], sin.chunk(2, -1)[half], value=sign)
    return output
