"""Law 1: the packed, prompt-shared path equals one plain forward per sequence, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import RAGGED, IdPair, random_pairs, tiny_model, with_lora

from qlora_dpo.data.packing import pack
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import choose_scorer

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys"),  # peft on fused experts
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),  # peft on gpt2's Conv1D
]

SHARING: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
    "gemma": {},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 4},
    "gpt_neox": {},
    "olmo2": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.2},
    "smollm3": {},
    "gpt2": {
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}
NOT_SHARING: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"head_dim": None, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4,
        "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
}  # fmt: skip


def plain_logps(model: Any, pairs: list[IdPair]) -> torch.Tensor:
    """The oracle: one forward per sequence with the model's own logits, nothing shared, nothing chunked."""
    logps = []
    for pair in pairs:
        for completion in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.tensor([[*pair.prompt_ids, *completion]])
            logits = model.get_base_model()(input_ids=ids, use_cache=False).logits[0].float()
            predicted = logits[len(pair.prompt_ids) - 1 : -1].log_softmax(-1)
            logps.append(predicted.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logps)


def gradients(model: Any, logps: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a fixed weighting of the log-probs, so that no two tokens cancel."""
    weights = torch.linspace(-1, 1, len(logps))
    return list(torch.autograd.grad((logps * weights).sum(), trainable_parameters(model), allow_unused=True))


def check_exact(model: Any, kind: str, lean: bool = False) -> None:
    pairs = random_pairs(RAGGED)
    scorer = choose_scorer(model, pairs[0], CPU)
    assert scorer.kind == kind
    plain = plain_logps(model, pairs)
    expected_gradients = gradients(model, plain)
    if lean:
        fuse_lora(model)
        make_lean(model)
    packed = scorer.per_token_logps(model, pack(pairs, scorer.kind))
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
    for ours, expected in zip(gradients(model, packed), expected_gradients, strict=True):
        if expected is None:
            assert ours is None
            continue
        assert (ours - expected).norm() <= 1e-5 * expected.norm() + 1e-7


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("lean", [False, True], ids=["own layers", "fused and lean"])
def test_shared_path_equals_plain_path(family: str, lean: bool) -> None:
    check_exact(with_lora(tiny_model(family, **SHARING[family])).eval(), "shared", lean)


@pytest.mark.parametrize("family", NOT_SHARING)
@pytest.mark.parametrize("lean", [False, True], ids=["own layers", "fused and lean"])
def test_family_that_cannot_share_is_padded_and_exact(family: str, lean: bool) -> None:
    check_exact(with_lora(tiny_model(family, **NOT_SHARING[family])).eval(), "padded", lean)
