"""The part of a base that text runs through; one that also sees or hears has towers beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from qlora_dpo.errors import ModelError

TOWERS = ("vision_config", "audio_config")


def refuse_other_than_text(name: str, config: Any, trust_remote_code: bool = False) -> None:
    """Refuse a base of which transformers makes no causal language model, which is the class that PEFT, `merge` and
    servers load it as again.

    Raises:
        ModelError: naming its kind.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    brings_code = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    sees = any(getattr(config, tower, None) is not None for tower in TOWERS)
    is_composite = config.get_text_config() is not config
    if brings_code or (type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (is_composite or not sees)):
        return
    kind = "a model of more than text, of which" if sees or is_composite else "a model of which"
    raise ModelError(
        f"{name} is {kind} transformers makes no language model that is trained on text alone (its model_type is "
        f"{config.model_type}). Name a language model; many families that see have one for text beside it."
    )


def text_model(model: Any) -> Any:
    """The part of a base, with or without an adapter, that text runs through: all of it but for a composite one."""
    config = getattr(model, "config", None)
    is_composite = config is not None and config.get_text_config() is not config
    return model.get_decoder() if is_composite else model


def beside_text(model: Any) -> list[str]:
    """The names of the modules that text never runs through, such as a vision tower; none in a language model."""
    decoder, head = text_model(model), model.get_output_embeddings()
    if decoder is model:
        return []

    def beside(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if child is decoder or child is head:
                continue
            if any(part is decoder for part in child.modules()):
                yield from beside(child, f"{prefix}{name}.")
            else:
                yield prefix + name

    return list(beside(model, ""))


def beside_text_pattern(model: Any) -> str | None:
    """PEFT's `exclude_modules` that keeps an adapter off these; None where none of them has a layer to adapt."""
    from transformers.pytorch_utils import Conv1D

    found = [
        name
        for name in beside_text(model)
        if any(isinstance(part, nn.Linear | Conv1D) for part in model.get_submodule(name).modules())
    ]
    return f"({'|'.join(map(re.escape, found))})($|\\..*)" if found else None
