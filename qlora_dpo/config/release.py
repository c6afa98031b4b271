"""The options of the commands that let a model leave the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class MergeOptions:
    """Merge: an adapter and the base it was trained on become one plain model."""

    adapter: Path
    """A finished run or any PEFT LoRA folder."""
    output: Path
    """Folder to write; must be absent or empty."""
    base: Literal["train", "original"] = "train"
    """train: the dequantized 4-bit base, which is what was trained. original: the 16-bit base."""
    base_model: str | None = None
    """Where the base is now, when it is not where adapter_config.json says."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type in which the merged weights are stored; the sum is formed in float32."""
    max_shard_size: str = "5GB"
    """Largest size of one safetensors file."""
    allow_unfinished: bool = False
    """Merge a run that has not finished its steps."""
