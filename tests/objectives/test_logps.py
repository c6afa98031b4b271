"""Chunked log-probs equal the log-softmax of a plain head in values and gradients, without its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dpo.objectives.logps import chunked_logps, chunked_logps_and_squares

HEADS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"softcap": 2.0},
    {"scale": 0.3},
    {"bias": True, "softcap": 3.0, "scale": 2.0},
]


def plain_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> Tensor:
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain_logps(target_ids: Tensor, *head: Any) -> Tensor:
    return plain_logits(*head).log_softmax(-1).gather(1, target_ids[:, None])[:, 0]


def make_head(
    n: int = 13,
    h: int = 6,
    v: int = 29,
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, h, generator=generator, dtype=torch.float64).to(dtype) for size in (n, v))
    offsets = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return hidden, weight, offsets, torch.randint(v, (n,), generator=generator)


def tiled(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, **options: Any) -> Tensor:
    options = {"token_chunk": 4, "vocab_chunk": 5} | options
    return chunked_logps(hidden, weight, target_ids, head_bias=bias, **options)


class OperationSpy(TorchDispatchMode):
    """Notes the largest tensor that any operation returned and the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, tuple | list) else [outputs]:
            if isinstance(output, Tensor):
                self.largest = max(self.largest, output.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.append(args[0].dtype)
        return outputs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_values_and_gradients_equal_the_plain_head(head: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, bias, target_ids = make_head(dtype=dtype, bias=head.get("bias", False))
    softcap, scale = head.get("softcap"), head.get("scale", 1.0)
    trained = [tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None]
    upstream = torch.linspace(-1, 2, len(hidden), dtype=dtype)
    ours = tiled(hidden, weight, bias, target_ids, softcap=softcap, logit_scale=scale)
    expected = plain_logps(target_ids, hidden, weight, bias, softcap, scale)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    ours_gradients = torch.autograd.grad(ours, trained, upstream)
    expected_gradients = torch.autograd.grad(expected, trained, upstream)
    torch.testing.assert_close(ours_gradients, expected_gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_gradients_pass_gradcheck(head: dict[str, Any]) -> None:
    hidden, weight, bias, target_ids = make_head(n=5, h=3, v=7, bias=head.get("bias", False))
    trained = tuple(tensor.requires_grad_() for tensor in (hidden, weight, bias) if tensor is not None)

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        options = {"softcap": head.get("softcap"), "logit_scale": head.get("scale", 1.0)}
        return tiled(hidden, weight, bias, target_ids, token_chunk=2, vocab_chunk=3, **options)

    assert torch.autograd.gradcheck(logps, trained)


@pytest.mark.parametrize("head", [{}, {"softcap": 2.0, "logit_scale": 0.5}], ids=str)
def test_values_squares_and_gradients_equal_trls_kernel(head: dict[str, Any]) -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight, _, target_ids = make_head(dtype=torch.float32)
    hidden.requires_grad_()
    logps, squares = chunked_logps_and_squares(hidden, weight, target_ids, token_chunk=4, vocab_chunk=5, **head)
    theirs, _, their_squares, _, _ = ChunkedLogProbFunction.apply(
        hidden,
        weight,
        None,
        target_ids,
        1.0,
        8,
        head.get("softcap"),
        head.get("logit_scale", 1.0),
        ("log_sum_sq_probs",),
    )
    torch.testing.assert_close(logps, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares, their_squares, rtol=1e-5, atol=1e-5)
    ours_gradient, their_gradient = (torch.autograd.grad(values.sum(), hidden)[0] for values in (logps, theirs))
    torch.testing.assert_close(ours_gradient, their_gradient, rtol=1e-5, atol=1e-5)


def test_squares_are_the_log_of_summed_squared_probabilities() -> None:
    hidden, weight, _, target_ids = make_head()
    logps, squares = chunked_logps_and_squares(hidden.requires_grad_(), weight, target_ids, vocab_chunk=5)
    expected = (hidden @ weight.T).softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(squares, expected.detach(), rtol=1e-10, atol=1e-10)
    assert logps.requires_grad and not squares.requires_grad


@pytest.mark.parametrize("chunks", [(1, 1), (3, 29), (13, 4), (500, 500)])
def test_results_do_not_depend_on_the_tiles(chunks: tuple[int, int]) -> None:
    hidden, weight, _, target_ids = make_head(dtype=torch.float32)
    hidden.requires_grad_()
    runs = [(8, 8), chunks]
    logps = [tiled(hidden, weight, None, target_ids, token_chunk=t, vocab_chunk=v) for t, v in runs]
    gradients = [torch.autograd.grad(values.sum(), hidden)[0] for values in logps]
    torch.testing.assert_close(*logps, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6)


def test_the_same_call_gives_the_same_bits() -> None:
    hidden, weight, bias, target_ids = make_head(n=64, h=32, v=300, dtype=torch.bfloat16, bias=True)
    trained = (hidden.requires_grad_(), weight.requires_grad_())
    first, second = (tiled(hidden, weight, bias, target_ids) for _ in range(2))
    assert torch.equal(first, second)
    gradients = [torch.autograd.grad(logps.sum(), trained) for logps in (first, second)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_no_tensor_comes_near_tokens_times_vocabulary(trained: bool) -> None:
    hidden, weight, _, target_ids = make_head(n=256, h=4, v=2000, dtype=torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with OperationSpy() as spy:
        tiled(hidden, weight, None, target_ids, token_chunk=64, vocab_chunk=100).sum().backward()
    assert spy.largest == (weight.numel() if trained else 64 * 100)


def test_a_frozen_head_costs_no_gradient_and_backward_no_product() -> None:
    hidden, weight, bias, target_ids = make_head(bias=True)
    assert bias is not None
    logps = tiled(hidden.requires_grad_(), weight, bias, target_ids)
    with OperationSpy() as spy:
        logps.sum().backward()
    assert spy.products == []
    assert weight.grad is None and bias.grad is None and hidden.grad is not None


def test_without_gradients_the_head_is_read_once() -> None:
    hidden, weight, _, target_ids = make_head()
    with torch.no_grad(), OperationSpy() as spy:
        logps = tiled(hidden.requires_grad_(), weight, None, target_ids, token_chunk=13, vocab_chunk=10)
    assert len(spy.products) == 3 and not logps.requires_grad


def test_a_trained_head_under_frozen_hidden_states_gets_its_gradient() -> None:
    hidden, weight, bias, target_ids = make_head(bias=True)
    assert bias is not None
    tiled(hidden, weight, bias.requires_grad_(), target_ids).sum().backward()
    (expected,) = torch.autograd.grad(plain_logps(target_ids, hidden, weight, bias, None, 1.0).sum(), bias)
    torch.testing.assert_close(bias.grad, expected)
    assert hidden.grad is None and weight.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_products_run_in_the_heads_dtype_and_sums_in_fp32(autocast: bool) -> None:
    hidden, weight, _, target_ids = make_head(n=40, h=64, v=300, dtype=torch.bfloat16)
    hidden = hidden.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast), OperationSpy() as spy:
        logps = tiled(hidden, weight, None, target_ids, vocab_chunk=64)
        gradient = torch.autograd.grad(logps.sum(), hidden)[0]
    assert set(spy.products) == {torch.bfloat16}
    assert logps.dtype == gradient.dtype == torch.float32
    exact = hidden.detach().double().requires_grad_()
    expected = plain_logps(target_ids, exact, weight.double(), None, None, 1.0)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    assert (logps - expected).abs().max() < 0.1  # logits up to 30 with 8 bits
    assert (gradient - expected_gradient).norm() < 0.02 * expected_gradient.norm()


def test_confident_tokens_keep_their_digits() -> None:
    # p(target) = 1 - 2e-9: log_softmax of fp32 logits says 0, and so does its gradient
    hidden, weight = torch.tensor([[20.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    target_ids = torch.tensor([0])
    logps = chunked_logps(hidden.requires_grad_(), weight, target_ids)
    exact = hidden.detach().double().requires_grad_()
    expected = plain_logps(target_ids, exact, weight.double(), None, None, 1.0)
    assert logps.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = [
        torch.autograd.grad(values.sum(), source)[0] for values, source in ((logps, hidden), (expected, exact))
    ]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-6, atol=0)


def test_extreme_logits_stay_finite() -> None:
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[300.0], [-300.0], [0.0]])
    for target, expected in enumerate([0.0, -600.0, -300.0]):
        assert chunked_logps(hidden, weight, torch.tensor([target]), vocab_chunk=1).item() == expected


def test_no_tokens_give_no_logps_and_a_zero_gradient() -> None:
    hidden, weight, _, target_ids = make_head(n=0)
    logps = tiled(hidden.requires_grad_(), weight.requires_grad_(), None, target_ids)
    logps.sum().backward()
    assert logps.shape == (0,) and hidden.grad is not None and hidden.grad.shape == (0, 6)
    assert weight.grad is not None and not weight.grad.any()


def test_a_target_outside_the_vocabulary_is_not_scored() -> None:
    hidden, weight, _, _ = make_head(n=2)
    assert tiled(hidden, weight, None, torch.tensor([29, -100])).isnan().all()
