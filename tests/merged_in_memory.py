"""What a merge is held against: base and adapter both in memory, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.models.lora import POLICY


def merged_weights(model: Any) -> dict[str, Tensor]:
    """State dict of the plain model in float32: every quantized weight dequantized, every adapter added.

    Names are those of the base without PEFT's wrappers.
    """
    from peft.tuners.lora import LoraLayer

    causal_lm = model.get_base_model()
    merged: dict[str, Tensor] = {}
    wrapped: dict[str, Any] = {
        name: module for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)
    }
    inside = tuple(f"{name}." for name in wrapped)
    for name, layer in wrapped.items():
        merged[f"{name}.weight"] = _plain_weight(layer.base_layer) + _update(layer)
        if getattr(layer.base_layer, "bias", None) is not None:
            merged[f"{name}.bias"] = layer.base_layer.bias.float()
    for name, module in causal_lm.named_modules():
        if name.startswith(inside) or name in wrapped:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            weight = _plain_weight(module) if key == "weight" else parameter.data
            merged[f"{name}.{key}".removeprefix(".")] = weight.float()
    return merged


def _update(layer: Any) -> Tensor:
    """(alpha / r) B A, in the base weight's orientation."""
    a, b = layer.lora_A[POLICY].weight.float(), layer.lora_B[POLICY].weight.float()
    update: Tensor = (b @ a) * layer.scaling[POLICY]
    return update.T if getattr(layer, "fan_in_fan_out", False) else update


def _plain_weight(module: nn.Module) -> Tensor:
    """The layer's weight in float32, dequantized where it is quantized."""
    from peft.utils.integrations import dequantize_module_weight

    return torch.as_tensor(dequantize_module_weight(module)).data.float()
