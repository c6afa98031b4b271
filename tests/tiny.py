"""Tiny real models and pairs, made on the spot: no network, no downloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class IdPair:
    """A pair of token ids, without text."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    category: str | None = None
    confidence: float = 1.0
    origin: str = "made"


def random_pairs(lengths: list[tuple[int, int, int]], vocabulary: int = 128, seed: int = 0) -> list[IdPair]:
    """Pairs of the given (prompt, chosen, rejected) lengths with random ids."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    return [IdPair(ids(prompt), ids(chosen), ids(rejected)) for prompt, chosen, rejected in lengths]


# Mixtures of experts, as changes of `tiny_config`; the last two have shared experts.
_MOE = {"num_experts_per_tok": 2}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _MOE | {"num_local_experts": 4},
    "qwen3_moe": _MOE | {"num_experts": 4, "moe_intermediate_size": 64},
    "olmoe": _MOE | {"num_experts": 4},
    "gpt_oss": _MOE | {"num_local_experts": 4, "sliding_window": 16},
    "qwen2_moe": _MOE | {
        "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128, "head_dim": None,
    },
    "deepseek_v3": _MOE | {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "head_dim": None, "num_key_value_heads": 4, "n_shared_experts": 1,
    },
}  # fmt: skip

RAGGED = [(7, 5, 3), (3, 1, 9), (12, 4, 1), (5, 8, 8), (1, 2, 3)]


def tiny_config(model_type: str = "llama", **changes: Any) -> Any:
    """A config of the family with every in_features a multiple of 64."""
    from transformers import CONFIG_MAPPING

    values: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    wanted = {name: value for name, value in (values | changes).items() if value is not None}
    return CONFIG_MAPPING[model_type](**wanted)


def tiny_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal language model of the family in fp32, with weights large enough to tell errors from noise."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "router" not in name:
                parameter.normal_(0, 0.08)
    return model.requires_grad_(False)


def with_lora(model: Any, r: int = 4, seed: int = 0, zero: bool = False) -> Any:
    """The model with a LoRA adapter on its linear layers; B is random unless `zero`."""
    from qlora_dpo.models.lora import add_adapter, trainable_parameters

    policy = add_adapter(model, r=r, alpha=2 * r, dropout=0.0, target_modules=["all-linear"], seed=seed)
    if not zero:
        torch.manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in trainable_parameters(policy):
                parameter.normal_(0, 0.05)
    return policy


def tiny_tokenizer(vocabulary: int = 128) -> Any:
    """A word-level tokenizer for `w3 w4 ...`, with a chat template, a BOS and an end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, vocabulary))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ 'w5 ' + message['content'] + ' ' + eos_token }}"
        "{% else %}{{ ' ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w5 ' }}{% endif %}"
    )
    return tokenizer
