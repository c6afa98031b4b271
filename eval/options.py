"""The options of `python -m eval`: frozen dataclasses whose help is the docstring under each field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AppOptions:
    """Page: one prompt, two answers."""

    adapter: Path
    """A run or any PEFT LoRA folder."""
    base_model: str | None = None
    """Where the base is now, when it is not where adapter_config.json says."""
    use_cpu: bool = False
    """Run on the CPU although there is a GPU."""
    port: int = 7860
    """Port on 127.0.0.1; 0 takes a free one."""
    max_new_tokens: int = 256
    """Longest answer that a visitor can ask for."""
