"""The f-divergences that hold the policy near the reference (f-DPO, arXiv 2309.16240), as rows of a table.

Each function maps log(pi / pi_ref) `[B]` to f'(pi / pi_ref), which takes its place in the implicit reward.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MAX_EXPONENT = 80.0  # exp(80) is still finite in fp32


def alpha_divergence(alpha: float, logratios: Tensor) -> Tensor:
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1) of t = pi / pi_ref; log t at its limit alpha = 1."""
    power = alpha - 1
    if abs(power) < 1e-6:
        return logratios
    return torch.expm1((power * logratios).clamp(max=MAX_EXPONENT)) / power


def reverse_kl(alpha: float, logratios: Tensor) -> Tensor:
    """f'(t) = log t (the constant 1 cancels in the margin): plain DPO."""
    return logratios


def forward_kl(alpha: float, logratios: Tensor) -> Tensor:
    """f'(t) = 1 - 1 / t, up to a constant: the alpha divergence at alpha = 0."""
    return alpha_divergence(0.0, logratios)


def js_divergence(alpha: float, logratios: Tensor) -> Tensor:
    """f'(t) = log(2 t / (1 + t))."""
    return math.log(2) + logsigmoid(logratios)


# `alpha` is read by the alpha divergence alone
F_DIVERGENCES: dict[str, Callable[[float, Tensor], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}
