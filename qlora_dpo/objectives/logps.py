"""Log-probs of completion tokens straight from hidden states, without ever holding the `[N, V]` logits.

Shapes in comments: N tokens, H hidden size, V vocabulary; n and v are one tile's share of N and V.

The vocabulary is scanned once per block of tokens with an online logsumexp. The gradient of log p(target) by
the hidden state depends on the upstream gradient only by a factor per token, so the same scan can collect it,
the way flash attention collects its output: with e_v = exp(z_v - max),

    d log p_t / d h  =  (1 - p_t) W_t  -  sum_{v != t} e_v W_v / sum_v e_v

The target is left out of the sums, so 1 - p_t keeps its precision when p_t is close to 1. Training thus costs
two matrix products, as a plain head does, keeps one `[N, H]` tensor for backward, and recomputes tiles only
for a head that is itself trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens x vocabulary of a tile. On a CPU 4 MiB of fp32 stay near the cache; a GPU needs larger products.
CPU_TILE = (512, 2048)
GPU_TILE = (4096, 8192)


def chunked_logps(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    *,
    head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> Tensor:
    """Return log p(target) of each position as `[N]` fp32 (float64 for a float64 head).

    `hidden [N, H]`, `head_weight [V, H]`, `head_bias [V]`, `target_ids [N]`. The logits are
    `softcap * tanh(logit_scale * (hidden @ head_weight.T + head_bias) / softcap)`; matrix products run in the
    weight's dtype, everything else in fp32. A target outside the vocabulary gives NaN or an IndexError.
    Gradients reach `hidden` and, only where they require it, the head's weight and bias.
    """
    head = _Head(head_weight, head_bias, softcap, logit_scale, *_tile_size(hidden, token_chunk, vocab_chunk))
    return _token_logps(hidden, target_ids, head, want_squares=False)[0]


def chunked_logps_and_squares(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    *,
    head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `chunked_logps` and, from the same scan, log(sum_v p_v^2) `[N]` without gradient.

    The second is what WPO (arXiv 2406.11827, eq. 2) aligns the weights of a pair with.
    """
    head = _Head(head_weight, head_bias, softcap, logit_scale, *_tile_size(hidden, token_chunk, vocab_chunk))
    logps, log_squares, _ = _token_logps(hidden, target_ids, head, want_squares=True)
    return logps, log_squares


def chunked_logps_and_hits(
    hidden: Tensor,
    head_weight: Tensor,
    target_ids: Tensor,
    *,
    head_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `chunked_logps` and, from the same scan, whether no token is likelier than the target: bool `[N]`."""
    head = _Head(head_weight, head_bias, softcap, logit_scale, *_tile_size(hidden, token_chunk, vocab_chunk))
    logps, _, hits = _token_logps(hidden, target_ids, head, want_squares=False)
    return logps, hits


@dataclass(frozen=True)
class _Head:
    """A language-model head and how it is cut into tiles."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    token_chunk: int
    vocab_chunk: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of everything that is summed: fp32, or float64 for a float64 head."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def vocab_tiles(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield each tile's part of the vocabulary, its logits `[n, v]`, and their slope under a softcap."""
        for columns in _slices(self.weight.shape[0], self.vocab_chunk):
            logits = _matmul(hidden, self.weight[columns].T, self.dtype)
            if self.bias is not None:
                logits += self.bias[columns]
            if self.logit_scale != 1.0:
                logits *= self.logit_scale
            if self.softcap is None:
                yield columns, logits, None
                continue
            bent = logits.div_(self.softcap).tanh_()
            slope = 1 - bent.square()
            yield columns, bent.mul_(self.softcap), slope

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of capped logits with respect to the logits before the cap."""
        return torch.ones_like(logits) if self.softcap is None else 1 - (logits / self.softcap).square()


@dataclass
class _Scan:
    """The online sums of n tokens over the vocabulary; the target counts for `maximum` but is in no sum."""

    maximum: Tensor  # [n]
    target_logits: Tensor  # [n]
    others: Tensor  # [n] sum of exp(z_v - maximum)
    squares: Tensor | None  # [n] sum of exp(z_v - maximum)^2
    pull: Tensor | None  # [n, H] sum of exp(z_v - maximum) * slope_v * W_v

    def logps(self) -> Tensor:
        # log(others + exp(gap)), written so that a confident target (gap 0, others tiny) keeps its digits
        gap = self.target_logits - self.maximum
        return gap - torch.log1p(self.others + torch.expm1(gap))

    def log_squares(self) -> Tensor:
        assert self.squares is not None
        target = torch.exp(self.target_logits - self.maximum)
        return torch.log(self.squares + target.square()) - 2 * torch.log(self.others + target)

    def hits(self) -> Tensor:
        return self.target_logits >= self.maximum

    def unit_gradient(self, head: _Head, target_ids: Tensor) -> Tensor:
        """d log p(target) / d hidden, `[n, H]`."""
        assert self.pull is not None
        total = self.others + torch.exp(self.target_logits - self.maximum)
        push = self.others * head.slope(self.target_logits)
        gradient = head.weight[target_ids] * push[:, None] - self.pull
        return gradient.mul_((head.logit_scale / total)[:, None])


def _scan_vocabulary(hidden: Tensor, target_ids: Tensor, head: _Head, squares: bool, gradient: bool) -> _Scan:
    """Read the head once for a block of tokens; `hidden [n, H]` in the weight's dtype, `target_ids [n]`."""
    zeros = torch.zeros(len(hidden), dtype=head.dtype, device=hidden.device)
    scan = _Scan(
        maximum=torch.full_like(zeros, -torch.inf),
        # NaN until it is met, so that an id outside the vocabulary cannot pass unseen
        target_logits=torch.full_like(zeros, torch.nan),
        others=zeros,
        squares=zeros if squares else None,
        pull=torch.zeros_like(hidden, dtype=head.dtype) if gradient else None,
    )
    for columns, logits, slope in head.vocab_tiles(hidden):
        is_here, at = _locate(target_ids, columns)
        scan.target_logits = torch.where(is_here, logits[at], scan.target_logits)
        maximum = torch.maximum(scan.maximum, logits.amax(dim=1))
        decay = torch.exp(scan.maximum - maximum)
        scan.maximum = maximum

        exps = logits.sub_(maximum[:, None]).exp_()
        exps[at] = exps[at].masked_fill(is_here, 0.0)
        scan.others = scan.others * decay + exps.sum(dim=1)
        if scan.squares is not None:
            scan.squares = scan.squares * decay.square() + torch.linalg.vector_norm(exps, dim=1).square()
        if scan.pull is not None:
            pulls = exps if slope is None else exps.mul_(slope)
            pulled = _matmul(pulls.to(head.weight.dtype), head.weight[columns], head.dtype)
            scan.pull.mul_(decay[:, None]).add_(pulled)
    return scan


class _TokenLogps(torch.autograd.Function):
    """`(hidden, weight, bias) -> (logps, log_squares, hits)`; `head` holds the last two as well."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        head: _Head,
        want_squares: bool,
        want_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        trains_hidden = want_gradients and hidden.requires_grad
        logps = torch.empty(len(hidden), dtype=head.dtype, device=hidden.device)
        log_normalizers, log_squares = torch.empty_like(logps), torch.empty_like(logps)
        hits = torch.empty_like(logps, dtype=torch.bool)
        unit_gradients = torch.empty_like(hidden) if trains_hidden else None
        for rows in _slices(len(hidden), head.token_chunk):
            scan = _scan_vocabulary(hidden[rows].to(weight.dtype), target_ids[rows], head, want_squares, trains_hidden)
            logps[rows] = scan.logps()
            hits[rows] = scan.hits()
            log_normalizers[rows] = scan.target_logits - logps[rows]
            if want_squares:
                log_squares[rows] = scan.log_squares()
            if unit_gradients is not None:
                unit_gradients[rows] = scan.unit_gradient(head, target_ids[rows])

        trains_head = want_gradients and (weight.requires_grad or (bias is not None and bias.requires_grad))
        ctx.head = head if trains_head else None
        ctx.save_for_backward(unit_gradients, *((hidden, target_ids, log_normalizers) if trains_head else ()))
        ctx.mark_non_differentiable(log_squares, hits)
        return logps, log_squares, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        unit_gradients, *for_head = ctx.saved_tensors
        grad_hidden, grad_weight, grad_bias = None, None, None
        if unit_gradients is not None:
            grad_hidden = (unit_gradients * grad_logps[:, None]).to(unit_gradients.dtype)
        if ctx.head is not None:
            grad_weight, grad_bias = _head_gradients(ctx.head, grad_logps, *for_head)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _token_logps(hidden: Tensor, target_ids: Tensor, head: _Head, want_squares: bool) -> tuple[Tensor, Tensor, Tensor]:
    # Without autocast: it would change the dtype of the products in forward but not in backward
    with torch.autocast(hidden.device.type, enabled=False):
        logps, log_squares, hits = _TokenLogps.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, target_ids, head, want_squares, torch.is_grad_enabled()
        )
    return logps, log_squares, hits


def _head_gradients(
    head: _Head, grad_logps: Tensor, hidden: Tensor, target_ids: Tensor, log_normalizers: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Recompute every tile for the gradients of a trained head, `[V, H]` and `[V]`, summed in fp32."""
    grad_weight = torch.zeros_like(head.weight, dtype=head.dtype)
    grad_bias = torch.zeros_like(grad_weight[:, 0])
    for rows in _slices(len(hidden), head.token_chunk):
        block = hidden[rows].to(head.weight.dtype)
        for columns, logits, slope in head.vocab_tiles(block):
            is_here, at = _locate(target_ids[rows], columns)
            # d logp / d logits = [v is the target] - p_v
            grad_logits = logits.sub_(log_normalizers[rows, None]).exp_().neg_()
            grad_logits[at] += is_here.to(head.dtype)
            grad_logits *= grad_logps[rows, None] * head.logit_scale
            if slope is not None:
                grad_logits *= slope
            grad_weight[columns] += _matmul(grad_logits.T.to(block.dtype), block, head.dtype)
            grad_bias[columns] += grad_logits.sum(dim=0)
    return grad_weight.to(head.weight.dtype), None if head.bias is None else grad_bias.to(head.bias.dtype)


def _matmul(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`left @ right` in `dtype`: on a GPU the sums of bf16 products are not rounded to bf16 on the way."""
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _locate(target_ids: Tensor, columns: slice) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Say which targets lie in these columns, and index one element per row of the tile: those targets."""
    local = target_ids - columns.start
    width = columns.stop - columns.start
    is_here = (local >= 0) & (local < width)
    return is_here, (torch.arange(len(local), device=local.device), local.clamp(0, width - 1))


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _tile_size(hidden: Tensor, token_chunk: int | None, vocab_chunk: int | None) -> tuple[int, int]:
    tokens, vocabulary = CPU_TILE if hidden.device.type == "cpu" else GPU_TILE
    return token_chunk or tokens, vocab_chunk or vocabulary
