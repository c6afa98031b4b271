"""Tiny random bases of many families, each as a user's folder: transformers' own config, a tokenizer, and pairs."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

Shape = dict[str, Any]

# every in_features a multiple of 64, as bitsandbytes' 4 bit on a CPU needs
SHAPE: Shape = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_GPT: Shape = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512}
_GEMMA_3: Shape = {"tie_word_embeddings": True, "sliding_window": 64, "query_pre_attn_scalar": 16}
_VISION: Shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
_MOE: Shape = {"num_experts_per_tok": 2}
_GRANITE: Shape = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.25}
FAMILIES: dict[str, Shape] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": None},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 64},
    "gemma3_text": _GEMMA_3,
    "gemma3": {
        "text_config": SHAPE | _GEMMA_3,
        "vision_config": _VISION | {"image_size": 28, "patch_size": 14, "num_channels": 3},
        "mm_tokens_per_image": 1,
    },
    "phi": {"head_dim": None, "num_key_value_heads": 4},
    "phi3": {"head_dim": None},
    "gpt2": _GPT | {"tie_word_embeddings": True},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True},
    "gpt_neox": {"head_dim": None},
    "gptj": _GPT | {"rotary_dim": 16},
    "bloom": {"n_head": 4, "n_layer": 2},
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1},
    "olmo2": {"head_dim": None},
    "olmo3": {"head_dim": None, "sliding_window": 64},
    "granite": _GRANITE | {"head_dim": None},
    "cohere": {"head_dim": None, "tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "sliding_window": 64},
    "starcoder2": {"head_dim": None},
    "stablelm": {"head_dim": None},
    "smollm3": {"head_dim": None},
    "glm4": {},
    "exaone4": {"sliding_window": 64},
    "seed_oss": {},
    "ernie4_5": {},
    "nemotron": {},
    "hunyuan_v1_dense": {},
    "mixtral": _MOE | {"num_local_experts": 4},
    "qwen2_moe": _MOE
    | {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "head_dim": None,
    },
    "qwen3_moe": _MOE | {"num_experts": 4, "moe_intermediate_size": 64},
    "olmoe": _MOE | {"num_experts": 4, "head_dim": None},
    "gpt_oss": _MOE | {"num_local_experts": 4, "sliding_window": 64},
    "granitemoe": _MOE | {"num_local_experts": 4, "head_dim": None},
    "llama4_text": _MOE | {"num_local_experts": 4, "intermediate_size_mlp": 128},
    "qwen3_next": _MOE
    | {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "glm4_moe": _MOE | {"n_routed_experts": 4, "moe_intermediate_size": 64, "first_k_dense_replace": 1},
    "deepseek_v3": _MOE
    | {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": None,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
    },
    "qwen2_5_vl": {
        "text_config": SHAPE | {"head_dim": None},
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    "lfm2": {"head_dim": None, "layer_types": ["conv", "full_attention"]},
    "mamba": {"head_dim": None, "state_size": 16, "time_step_rank": 64},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4},
}


def make(family: str, tokenizer: str, folder: str) -> None:
    """Write a random base with a tokenizer, and pairs: eight to train on, two held out."""
    import torch
    from transformers import CONFIG_MAPPING, AutoTokenizer
    from transformers.models.auto import modeling_auto as auto

    words = AutoTokenizer.from_pretrained(tokenizer)
    ids = {name: getattr(words, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    own = ids | {"vocab_size": -(-len(words) // 64) * 64}
    changes = FAMILIES[family]
    if "text_config" in changes:
        values = ids | changes | {"text_config": changes["text_config"] | own}
    else:
        values = {name: value for name, value in (SHAPE | own | changes).items() if value is not None}
    config = CONFIG_MAPPING[family](**values)
    kinds = (auto.AutoModelForCausalLM, auto.AutoModelForImageTextToText, auto.AutoModelForSeq2SeqLM)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "router" not in name:  # large enough to tell errors from rounding
                parameter.normal_(0, 0.08)
    model.to(torch.bfloat16).save_pretrained(Path(folder) / "base")
    words.save_pretrained(Path(folder) / "base")
    nouns = "apple river stone bread cloud horse lamp chair paper garden apple".split()
    pairs = [
        {"prompt": f"What is a {one}?", "chosen": f"A {one} is not a {other}.", "rejected": f"{other}?"}
        for one, other in pairwise(nouns)
    ]
    for file, rows in (("pairs.jsonl", pairs[:8]), ("held_out.jsonl", pairs[8:])):
        (Path(folder) / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
