"""What is measured at which size: the models' shapes, the steps, and the same in small for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SEED = 0
SEED_STEPS, SEED_PAIRS, SEED_RANK = 100, 16, 256
"""The run of 2023 that the headline is about: 100 steps of 16 pairs of 1,000 in all, r=256, five hours."""
SEED_DISTINCT_PAIRS, SEED_SECONDS = 1000, 5 * 3600


@dataclass(frozen=True)
class Shape:
    """A model's architecture without weights: keyword arguments of its transformers config."""

    model_type: str
    config: dict[str, Any]

    @property
    def vocabulary(self) -> int:
        """Token ids there are."""
        return int(self.config["vocab_size"])


def _shape(model_type: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Shape:
    values = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return Shape(model_type, values)


REAL_SHAPES = {
    "33B": _shape("llama", 6656, 17_920, 60, 52, 52, 32_000),
    "7B": _shape("llama", 4096, 11_008, 32, 32, 32, 32_000),
    "70B": _shape("llama", 8192, 28_672, 80, 64, 8, 128_256),
    "Qwen2.5-7B": _shape("qwen2", 3584, 18_944, 28, 28, 4, 152_064),
}
TINY_SHAPES = {
    "33B": _shape("llama", 128, 256, 2, 2, 2, 256),
    "7B": _shape("llama", 64, 128, 2, 2, 2, 256),
    "70B": _shape("llama", 128, 320, 2, 4, 2, 256),
    "Qwen2.5-7B": _shape("qwen2", 64, 128, 2, 2, 1, 512),
}


@dataclass(frozen=True)
class Scale:
    """One size of the whole run."""

    name: str
    shapes: dict[str, Shape]
    pairs_per_step: int
    shorter: int
    """The seed's lengths are divided by this."""
    steps: int
    """Counted steps of a program; one more warms it up."""
    lever_steps: int
    """Counted steps of a lever, which a few pairs warm up."""
    rank: int
    ranks: tuple[int, ...]
    """Of the memory table."""
    budgets: tuple[int, ...]
    """Tokens of a micro-batch there."""
    attention_tokens: int
    check_width: int
    """Of the model that the checks are made on."""


SCALES = {
    "real": Scale("real", REAL_SHAPES, SEED_PAIRS, 1, 3, 2, SEED_RANK, (16, 64, 256), (2048, 6144), 600, 1024),
    "tiny": Scale("tiny", TINY_SHAPES, 4, 8, 3, 1, 8, (4,), (64,), 40, 128),
}
