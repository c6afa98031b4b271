"""The table of what can be written, and what llama.cpp's form of a family cannot say.

Sources: conversion/{llama,qwen,phi,gemma}.py and src/models/*.cpp of llama.cpp.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_dpo.config.release import GgufOptions
from qlora_dpo.errors import ModelError

_GEMMA_PERIOD, _GEMMA_LOCAL_THETA, _GEMMA_27B_LAYERS = 6, 10000.0, 62
_IN_ROPE = {"rope_type", "rope_theta", "type", "factor", "original_max_position_embeddings"}
_ROPE = {
    "default": _IN_ROPE,
    "linear": _IN_ROPE,
    "llama3": _IN_ROPE | {"low_freq_factor", "high_freq_factor"},
    "yarn": _IN_ROPE | {"beta_fast", "beta_slow"},
    "longrope": _IN_ROPE | {"short_factor", "long_factor", "attention_factor"},
}


def _nothing(_: Any) -> dict[str, bool]:
    return {}


def _of_gemma_3(config: Any) -> dict[str, bool]:
    """llama.cpp has Gemma 3's pattern, local frequencies and attention scale in its code, not in the file."""
    pattern = [
        "full_attention" if (place + 1) % _GEMMA_PERIOD == 0 else "sliding_attention"
        for place in range(config.num_hidden_layers)
    ]
    is_27b = config.num_hidden_layers == _GEMMA_27B_LAYERS
    scale = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
    local = config.rope_parameters["sliding_attention"]
    return {
        f"layer_types other than every {_GEMMA_PERIOD}th a full one": list(config.layer_types) != pattern,
        f"query_pre_attn_scalar {config.query_pre_attn_scalar}": config.query_pre_attn_scalar != scale,
        f"rope_parameters {local} of its sliding layers": (
            (local.get("rope_type", "default"), local["rope_theta"]) != ("default", _GEMMA_LOCAL_THETA)
        ),
        "softcapping": bool(config.attn_logit_softcapping or config.final_logit_softcapping),
        "bidirectional attention": bool(config.use_bidirectional_attention),
    }


@dataclass(frozen=True)
class Architecture:
    """A row of the table."""

    gguf_name: str
    ropes: frozenset[str]
    """The kinds of rotary frequencies that llama.cpp computes for it."""
    permutes: bool = False
    """Query and key rows change their order: llama.cpp turns neighboring numbers, transformers the halves of a head."""
    has_bias: bool = False
    """Attention may have biases."""
    turns_part: bool = False
    """`partial_rotary_factor` may be less than 1."""
    windows: bool = False
    """llama.cpp attends to no more than the sliding window where the model does."""
    norm_offset: float = 0.0
    """transformers multiplies by this plus a norm's weight, llama.cpp by the weight."""
    activation: str = "silu"
    cannot: Callable[[Any], dict[str, bool]] = _nothing
    """What more llama.cpp cannot say about a config, and whether the config has it."""


_PLAIN = frozenset({"default", "linear", "yarn"})
_GEMMA_3 = Architecture(
    "gemma3", frozenset({"default", "linear"}), windows=True, norm_offset=1.0, activation="gelu_pytorch_tanh",
    cannot=_of_gemma_3,
)  # fmt: skip
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", _PLAIN | {"llama3"}, permutes=True, has_bias=True),
    "MistralForCausalLM": Architecture("llama", _PLAIN | {"llama3"}, permutes=True),
    "Qwen2ForCausalLM": Architecture("qwen2", _PLAIN, has_bias=True),
    "Qwen3ForCausalLM": Architecture("qwen3", _PLAIN),
    "Phi3ForCausalLM": Architecture("phi3", frozenset({"default", "longrope"}), turns_part=True),
    "Gemma3ForCausalLM": _GEMMA_3,
    "Gemma3ForConditionalGeneration": _GEMMA_3,
}


def architecture_of(config: Any, options: GgufOptions) -> Architecture:
    """The row for this model.

    Raises:
        ModelError: it is of another architecture, or has a setting that llama.cpp's one lacks.
    """
    folder = options.folder
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if name not in ARCHITECTURES:
        paths = [shlex.quote(str(path)) for path in (folder, options.output)]
        raise ModelError(
            f"{folder} is a {name}; GGUF is written here for {', '.join(ARCHITECTURES)}. llama.cpp's own converter "
            "knows more. In a copy of llama.cpp's sources run: "
            f"python convert_hf_to_gguf.py {paths[0]} --outfile {paths[1]} --outtype {options.outtype}"
        )
    architecture = ARCHITECTURES[name]
    lacking = [reason for reason, holds in _lacking(config.get_text_config(), architecture).items() if holds]
    if lacking:
        raise ModelError(
            f"{folder} has {' and '.join(lacking)}, which GGUF's {architecture.gguf_name} does not say. Serve "
            "the folder with vLLM or transformers instead."
        )
    return architecture


def _lacking(config: Any, architecture: Architecture) -> dict[str, bool]:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    known = _ROPE.get(kind, set()) | ({"partial_rotary_factor"} if architecture.turns_part else set())
    others = {key: value for key, value in rope.items() if value is not None and key not in known}
    if others.get("partial_rotary_factor") == 1:
        del others["partial_rotary_factor"]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    is_known = kind in architecture.ropes
    return {
        f"hidden_act {activation}": activation != architecture.activation,
        f"rope_type {kind}": not is_known,
        f"rope_parameters {', '.join(f'{key}={value}' for key, value in others.items())}": is_known and bool(others),
        "biases in attention": not architecture.has_bias and bool(getattr(config, "attention_bias", False)),
        "sliding-window attention": bool(getattr(config, "use_sliding_window", False)),
    } | architecture.cannot(config)


def notes_of(config: Any, architecture: Architecture) -> list[str]:
    """What a user has to know about llama.cpp's form of this model."""
    text = config.get_text_config()
    rope, window = rope_of(text), getattr(text, "sliding_window", None)
    notes = []
    if text is not config:
        notes.append("The file holds the part of the model that text runs through, without its vision tower.")
    if window and not architecture.windows and window < text.max_position_embeddings:
        notes.append(
            f"The model attends to the last {window:,} tokens, llama.cpp's {architecture.gguf_name} to all of them: "
            f"beyond {window:,} tokens they differ."
        )
    if rope.get("rope_type") == "longrope":
        trained = rope["original_max_position_embeddings"]
        notes.append(
            f"llama.cpp turns to the frequencies for long texts where its context (-c) is above {trained:,} tokens, "
            f"transformers where the text is. For shorter texts give it a context of at most {trained:,}."
        )
    return notes


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary parameters; those of full attention where a model has more than one kind."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)
