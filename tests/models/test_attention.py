"""The attention over a packed row: gathered keys, and the two kernels against what torch documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import RAGGED, random_pairs, tiny_model, with_lora
from torch import Tensor

from qlora_dpo.data.packing import PackedLayout, pack
from qlora_dpo.models import attention
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import choose_scorer

HEADS, KV_HEADS, SIZE = 4, 2, 8


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """What torch documents of `varlen_attn`: per sequence, lower-right causal for (-1, 0), W back for (W, 0)."""
    outputs = []
    for n in range(len(cu_q) - 1):
        q, k, v = (tensor[int(cu[n]) : int(cu[n + 1])] for tensor, cu in ((query, cu_q), (key, cu_k), (value, cu_k)))
        assert len(q) <= max_q and len(k) <= max_k and window_size[1] == 0
        k, v = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (k, v))
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))[None]
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or SIZE**-0.5)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def layout() -> PackedLayout:
    packed = pack(random_pairs(RAGGED), "shared").layout
    assert packed is not None
    return packed


def states(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((1, HEADS, tokens, SIZE), (1, KV_HEADS, tokens, SIZE), (1, KV_HEADS, tokens, SIZE))
    query, key, value = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return query, key, value


def rows(*tensors: Tensor) -> list[Tensor]:
    return [tensor[0].transpose(0, 1) for tensor in tensors]


@pytest.mark.parametrize("window", [None, 1, 3, 1000])
def test_sdpa_by_segment_is_what_varlen_attn_documents(window: int | None) -> None:
    tokens = int(layout().cu_seq_q[-1])
    results = []
    for kernel in (attention._sdpa_by_segment, plain_varlen):
        query, key, value = states(tokens)
        output = attention.attend(*rows(query, key, value), layout(), 0.3, window, kernel)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        (output * weights).sum().backward()
        results.append((output, query.grad, key.grad, value.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("window", [None, 3])
def test_bf16_on_a_cpu_is_no_further_from_the_truth_than_sdpa(window: int | None) -> None:
    tokens = int(layout().cu_seq_q[-1])
    truth, own, ours = [], [], []
    for kept, kernel, dtype in (
        (truth, plain_varlen, torch.float64),
        (own, plain_varlen, torch.bfloat16),
        (ours, attention._sdpa_by_segment, torch.bfloat16),
    ):
        leaves = [tensor.detach().bfloat16().to(dtype).requires_grad_() for tensor in states(tokens)]
        output = attention.attend(*rows(*leaves), layout(), 0.3, window, kernel)
        (output * torch.linspace(-1, 1, output.numel()).to(dtype).view_as(output)).sum().backward()
        kept += [output, *(leaf.grad for leaf in leaves)]
    for exact, theirs, found in zip(truth, own, ours, strict=True):
        assert (found - exact).norm() <= 1.05 * (theirs - exact).norm()


def test_gather_adds_each_shared_prompt_once_in_backward() -> None:
    packed = layout()
    rows = torch.randn(int(packed.cu_seq_q[-1]), 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tensor: attention._GatherRows.apply(tensor, packed), rows)


def test_layout_counts_keys_and_borders() -> None:
    packed = layout()
    assert len(packed.key_index) == int(packed.cu_seq_k[-1])
    saved = sum(segment.prefix_length for segment in packed.segments)
    assert len(packed.key_index) == int(packed.cu_seq_q[-1]) + saved
    assert packed.max_q == max(segment.length for segment in packed.segments)


def test_row_without_a_layout_is_plain_sdpa() -> None:
    query, key, value = states(6)
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KV_HEADS
    module.is_causal = True
    output, _ = attention.prefix_shared_attention(module, query, key, value, None, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2))


@pytest.mark.parametrize("asked", [{"softcap": 2.0}, {"s_aux": torch.zeros(HEADS)}, {"dropout": 0.1}])
def test_what_segments_cannot_honor_is_refused(asked: dict[str, Any]) -> None:
    query, key, value = states(int(layout().cu_seq_q[-1]))
    with pytest.raises(NotImplementedError):
        attention.prefix_shared_attention(torch.nn.Module(), query, key, value, None, prefix_layout=layout(), **asked)


def test_generation_and_padded_batches_work_as_with_sdpa() -> None:
    plain, shared = tiny_model(), with_lora(tiny_model(), zero=True).eval()
    assert choose_scorer(shared, random_pairs(RAGGED)[0], torch.device("cpu")).kind == "shared"
    ids = torch.tensor([[0, 0, 1, 7, 9], [1, 5, 6, 8, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    assert torch.equal(plain.generate(input_ids=ids, **options), shared.generate(input_ids=ids, **options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_real_kernel_equals_segment_by_segment(window: int | None) -> None:
    if attention._varlen_attn() is None:
        pytest.skip("this torch has no varlen_attn with scale and window_size")
    device = torch.device("cuda")
    packed = layout().to(device)
    tokens = int(packed.cu_seq_q[-1])
    results = []
    kernels = ((attention._sdpa_by_segment, torch.float32), (attention._varlen_attn(), torch.bfloat16))
    for kernel, dtype in kernels:
        torch.manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, tokens, 64, device=device).to(torch.bfloat16).to(dtype).requires_grad_()
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        output = attention.attend(*rows(query, key, value), packed, 0.125, window, kernel)
        (output.float() * torch.linspace(-1, 1, output.numel(), device=device).view_as(output)).sum().backward()
        results.append([tensor.float() for tensor in (output, query.grad, key.grad, value.grad)])
    for expected, ours in zip(*results, strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_packed_scoring_on_the_card_equals_padded_rows() -> None:
    device = torch.device("cuda")
    model = with_lora(tiny_model(head_dim=64, num_attention_heads=2, num_key_value_heads=1)).to(device).bfloat16()
    pairs = random_pairs(RAGGED)
    scorer = choose_scorer(model, pairs[0], device)
    assert scorer.kind == "shared"
    shared = scorer.per_token_logps(model, pack(pairs, "shared").to(device))
    padded = scorer.per_token_logps(model, pack(pairs, "padded").to(device))
    assert (shared - padded).abs().mean() < 0.05
    for parameter in trainable_parameters(model):
        assert parameter.device.type == "cuda"
