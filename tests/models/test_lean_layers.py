"""Lean norms and rotary positions: what is replaced where, and that each equals the module that it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_packed_exact import NOT_SHARING, SHARING
from tiny import tiny_model, with_lora
from torch import Tensor

from qlora_dpo.models import lean_layers
from qlora_dpo.models.lean_layers import make_lean

pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # peft on fused experts
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft on gpt2's Conv1D
]
# (norms, attention layers) replaced of two layers each; all others keep their own
REPLACED = {
    "mistral": (5, 2), "mixtral": (5, 2), "qwen2": (5, 2), "qwen3": (9, 2), "qwen3_moe": (9, 2), "gemma": (5, 2),
    "gemma3_text": (13, 2), "phi3": (5, 2), "olmo2": (9, 2), "granite": (5, 2), "smollm3": (5, 2), "llama": (5, 2),
    "cohere": (0, 0), "gpt_neox": (0, 2), "gpt2": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("family", SHARING)
def test_which_layers_are_replaced(family: str) -> None:
    assert make_lean(with_lora(tiny_model(family, **SHARING[family]))) == REPLACED[family]


def test_transformers_own_functions_stay_as_they_are() -> None:
    from transformers.models.llama import modeling_llama

    before = (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward)
    make_lean(with_lora(tiny_model()))
    assert (modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward) == before


def _norm_of(family: str, dtype: torch.dtype) -> Any:
    options = (SHARING | NOT_SHARING)[family]
    model = tiny_model(family, **options)
    norm = next(m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and len(m.weight) == 64)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm.to(dtype).requires_grad_(False)


def _both(module: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(output, gradient) of the module as it came and replaced."""
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        output = module(leaf)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
        assert leaf.grad is not None
        results.append((output.detach(), leaf.grad))
        assert lean_layers._replace_norm(module)
    return results


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_norm_is_the_modules_own(family: str, rows: int) -> None:
    own, lean = _both(_norm_of(family, torch.float32), torch.randn(1, rows, 64) * 3)
    for ours, theirs in zip(lean, own, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_norm_in_bf16_is_no_further_from_the_truth_than_the_modules_own() -> None:
    x = torch.randn(1, 500, 64)
    norm = _norm_of("llama", torch.bfloat16)
    truth = _both(norm.float(), x.bfloat16().float())[0]
    norm.__dict__.pop("forward")
    own, lean = _both(norm.bfloat16(), x.bfloat16())
    for exact, theirs, ours in zip(truth, own, lean, strict=True):
        assert (ours.float() - exact).norm() <= 1.05 * (theirs.float() - exact).norm()


def test_norm_gradient_in_float64() -> None:
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(64, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda rows: lean_layers._norm(gain, 1e-6, 0.0, rows), x)


def test_norm_keeps_its_input_and_one_number_per_row() -> None:
    x = torch.randn(1, 50, 64, requires_grad=True)
    norm = _norm_of("llama", torch.float32)
    assert lean_layers._replace_norm(norm)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    own = [tensor for tensor in kept if tensor.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr())]
    assert sum(tensor.numel() for tensor in own) <= 50 + 64


def test_a_norm_that_trains_or_computes_something_else_keeps_its_forward() -> None:
    norm = _norm_of("llama", torch.float32)
    norm.weight.requires_grad_()
    assert not lean_layers._replace_norm(norm)

    class OddRMSNorm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(64), requires_grad=False), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    assert not lean_layers._replace_norm(OddRMSNorm())


def test_rotation_gradient_in_float64() -> None:
    torch.manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2))
    cos, sin = (torch.randn(1, 1, 3, 8, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lean_layers._Rotate.apply, (query, key, cos, sin))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_norm_on_the_card_is_the_modules_own(family: str) -> None:
    own, lean = _both(_norm_of(family, torch.bfloat16).cuda(), torch.randn(1, 500, 64, device="cuda").bfloat16())
    for ours, theirs in zip(lean, own, strict=True):
        assert (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm()


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3", "gemma3_text"])
def test_a_bf16_model_runs_with_the_rotation_of_its_own_type(family: str) -> None:
    """OLMo 2 rotates in fp32 and goes back; attention takes no mixture of types."""
    model = tiny_model(family, **SHARING.get(family, {})).to(torch.bfloat16)
    ids = torch.arange(3, 13)[None]
    plain = model(ids).logits
    assert make_lean(with_lora(model, zero=True))[1] == 2
    assert (model(ids).logits - plain).abs().max() < 0.1 * plain.abs().max()
