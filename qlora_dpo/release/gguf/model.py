"""A model as GGUF keeps it: which architectures are known, their settings, and each tensor under llama.cpp's name.

LLaMA's query and key rows are kept in another order there: llama.cpp turns neighboring numbers, transformers the two
halves of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dpo.errors import ModelError

LARGEST_FLOAT16 = 65504.0


@dataclass(frozen=True)
class Architecture:
    """A row of the table of what can be written."""

    gguf_name: str
    permutes: bool
    """Query and key rows change their order."""


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", permutes=True),
    "Qwen2ForCausalLM": Architecture("qwen2", permutes=False),
}
_IN_ROPE = {"rope_type", "rope_theta", "type", "factor", "original_max_position_embeddings"}
_ROPE = {
    "default": _IN_ROPE,
    "linear": _IN_ROPE,
    "llama3": _IN_ROPE | {"low_freq_factor", "high_freq_factor"},
    "yarn": _IN_ROPE | {"beta_fast", "beta_slow"},
}


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the folder, its name and shape in the file, and how it is read."""

    name: str
    shape: tuple[int, ...]
    file: Path | None
    """None: made, not read."""
    source: str
    heads: int = 0
    """Its rows are reordered within so many heads."""

    def read(self, config: Any) -> np.ndarray:
        """The values in float32, in llama.cpp's order."""
        from safetensors import safe_open

        if self.file is None:
            return rope_factors(config)
        with safe_open(self.file, framework="pt") as opened:
            tensor = opened.get_tensor(self.source).to(torch.float32)
        values: np.ndarray = (permuted(tensor, self.heads) if self.heads else tensor).numpy()
        return values


def architecture_of(config: Any, folder: Path) -> Architecture:
    """The row for this model.

    Raises:
        ModelError: it is of another architecture, or has a setting that llama.cpp's one lacks.
    """
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{folder} is a {name}; GGUF is written for {', '.join(ARCHITECTURES)}. Convert it with llama.cpp's "
            "convert_hf_to_gguf.py, or serve the folder with vLLM."
        )
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    others = {key: value for key, value in rope.items() if value is not None and key not in _ROPE.get(kind, ())}
    reasons = {
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        f"rope_type {kind}": kind not in _ROPE,
        f"rope_parameters {', '.join(f'{key}={value}' for key, value in others.items())}": kind in _ROPE and others,
        "sliding-window attention": getattr(config, "use_sliding_window", False),
    }
    lacking = [reason for reason, holds in reasons.items() if holds]
    if lacking:
        raise ModelError(
            f"{folder} has {' and '.join(lacking)}, which GGUF's {ARCHITECTURES[name].gguf_name} does not say. Serve "
            "the folder with vLLM or transformers instead."
        )
    return ARCHITECTURES[name]


def add_settings(writer: Any, config: Any) -> None:
    """The model's shape, as llama.cpp's keys."""
    from gguf import RopeScalingType

    head_dim = head_dim_of(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    kind = rope.get("rope_type", "default")
    if kind in {"linear", "yarn"}:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        trained = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(trained))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))


def source_tensors(config: Any, architecture: Architecture, folder: Path) -> Iterator[SourceTensor]:
    """Every tensor of the folder's safetensors files, under its name in the file.

    Raises:
        ModelError: one has no place in this architecture, or the output layer is missing.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from safetensors import safe_open

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture.gguf_name)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    found = set()
    if config.rope_parameters.get("rope_type") == "llama3":
        yield SourceTensor("rope_freqs.weight", (head_dim_of(config) // 2,), None, "rope_freqs")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for source in opened.keys():
                if source.endswith("rotary_emb.inv_freq") or (
                    config.tie_word_embeddings and source == "lm_head.weight"
                ):
                    continue
                name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ModelError(f"{folder}: {source} has no place in a GGUF of {architecture.gguf_name}.")
                shape = tuple(opened.get_slice(source).get_shape())
                in_heads = next((count for part, count in heads.items() if part in source), 0)
                found.add(name)
                yield SourceTensor(name, shape, file, source, in_heads if architecture.permutes else 0)
    if not config.tie_word_embeddings and "output.weight" not in found:
        raise ModelError(f"{folder}: lm_head.weight is missing, and its config does not tie it to the embeddings.")


def head_dim_of(config: Any) -> int:
    """Numbers in a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in halves of a head to rows in neighboring pairs."""
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


def rope_factors(config: Any) -> np.ndarray:
    """By how much Llama 3 slows each rotary frequency down."""
    rope = config.rope_parameters
    dim = head_dim_of(config)
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    smooth = (trained / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(lengths < trained / high, 1.0, np.where(lengths > trained / low, factor, between))
    return factors.astype(np.float32)
