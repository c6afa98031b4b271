"""A model as GGUF keeps it: its settings, and each tensor under llama.cpp's name and in its order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dpo.errors import ModelError
from qlora_dpo.models.weight_files import weight_files
from qlora_dpo.release.gguf.families import Architecture, rope_of

LARGEST_FLOAT16 = 65504.0
_BESIDE_TEXT = ("vision_tower.", "multi_modal_projector.")


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the folder, its name and shape in the file, and how it is read."""

    name: str
    shape: tuple[int, ...]
    file: Path | None
    source: str
    heads: int = 0
    """Its rows are reordered within so many heads."""
    offset: float = 0.0
    """Added to each number."""
    made: np.ndarray | None = None
    """The values of a tensor that is in no file of the folder."""

    def read(self) -> np.ndarray:
        """The values in float32, in llama.cpp's order."""
        from safetensors import safe_open

        if self.file is None:
            assert self.made is not None
            return self.made
        with safe_open(self.file, framework="pt") as opened:
            tensor = opened.get_tensor(self.source).to(torch.float32) + self.offset
        values: np.ndarray = (permuted(tensor, self.heads) if self.heads else tensor).numpy()
        return values


def add_settings(writer: Any, config: Any, architecture: Architecture) -> None:
    """The model's shape, as llama.cpp's keys."""
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
    # phi3 in llama.cpp attends to everything, and tells Phi-3 from Phi-4 by this key, which is 0 there.
    if architecture.windows or architecture.gguf_name == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    _add_rope(writer, config)


def _add_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    writer.add_rope_dimension_count(int(head_dim_of(config) * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if kind in {"linear", "yarn"}:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind in {"yarn", "longrope"}:
        writer.add_rope_scaling_orig_ctx_len(_trained_length(config))
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))
    if kind == "longrope":  # without a scaling type: llama.cpp knows it by its two tensors of factors
        writer.add_rope_scaling_attn_factors(_longrope_attention(config))


def source_tensors(config: Any, architecture: Architecture, folder: Path) -> Iterator[SourceTensor]:
    """Every tensor of the folder's safetensors files that text runs through, under its name in the file.

    Raises:
        ModelError: one has no place in this architecture, or the output layer is missing.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from safetensors import safe_open

    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture.gguf_name)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = set()
    for made, values in _rope_tensors(config).items():
        yield SourceTensor(made, values.shape, None, "rope_parameters", made=values)
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for source in opened.keys():
                plain = source.replace("language_model.", "")
                is_beside = any(part in source for part in _BESIDE_TEXT)
                if is_beside or plain.endswith("rotary_emb.inv_freq") or plain in tied:
                    continue
                shape = tuple(opened.get_slice(source).get_shape())
                name = names.get_name(plain, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ModelError(f"{folder}: {source} has no place in a GGUF of {architecture.gguf_name}.")
                found.add(name)
                heads = _heads(config, plain) if architecture.permutes else 0
                offset = architecture.norm_offset if plain.endswith("norm.weight") else 0.0
                yield SourceTensor(name, shape, file, source, heads, offset)
    if not tied and "output.weight" not in found:
        raise ModelError(f"{folder}: lm_head.weight is missing, and its config does not tie it to the embeddings.")


def _heads(config: Any, source: str) -> int:
    """Heads of a query or key projection, whose rows llama.cpp may keep in another order."""
    counts = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    return next((count for part, count in counts.items() if part in source), 0)


def head_dim_of(config: Any) -> int:
    """Numbers in a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in halves of a head to rows in neighboring pairs."""
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape).contiguous()


def _rope_tensors(config: Any) -> dict[str, np.ndarray]:
    """The tensors by which llama.cpp divides rotary frequencies."""
    rope = rope_of(config)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama_3_factors(rope, head_dim_of(config))}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}


def _llama_3_factors(rope: Any, dim: int) -> np.ndarray:
    """By how much Llama 3 slows each rotary frequency down."""
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    smooth = (trained / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(lengths < trained / high, 1.0, np.where(lengths > trained / low, factor, between))
    return factors.astype(np.float32)


def _longrope_attention(config: Any) -> float:
    """What LongRoPE multiplies rotated queries and keys by (transformers' `_compute_longrope_parameters`)."""
    rope, trained = rope_of(config), _trained_length(config)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope.get("factor") or config.max_position_embeddings / trained
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0


def _trained_length(config: Any) -> int:
    return int(rope_of(config).get("original_max_position_embeddings") or config.max_position_embeddings)
