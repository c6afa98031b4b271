"""A quantized base with random weights, built straight on the device: one layer at a time is ever held in 16 bit.

Modules, types and quantization are those that loading would give (tests/benchmarks/test_gpu_models.py compares them).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

from benchmarks.gpu.scale import SEED, Shape
from qlora_dpo.config.training import ModelOptions, quantization_of
from qlora_dpo.models.loading import disable_dropout, keep_cpu_layers_differentiable, model_on_meta

STD = 0.02  # of the weights, as models are initialized
PLACES = 2**20  # of the random block's end, so many values more than the largest weight has
BLOCK = 64  # windows begin at whole blocks of the quantization

Weights = Callable[[str, torch.Size], Tensor]
"""The 16-bit values of a parameter, by its name and shape, on the device that the model is built on."""


def hub_config(shape: Shape) -> Any:
    """The transformers config of a shape."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[shape.model_type](**shape.config)


def config_folder(shape: Shape, folder: Path) -> str:
    """Save the config without weights, which is all that `plan` reads of a model; returns the folder's name."""
    hub_config(shape).save_pretrained(folder)
    return str(folder)


class RandomWeights:
    """Normal values: every weight is a window of one random block, beginning elsewhere; gains are 1, biases 0."""

    def __init__(self, largest: int, device: torch.device, dtype: torch.dtype) -> None:
        self._generator = torch.Generator(device).manual_seed(SEED)
        self._start = random.Random(SEED)
        self._block = self._normal(torch.Size([largest + PLACES]), device, dtype)

    def __call__(self, name: str, shape: torch.Size) -> Tensor:
        count = shape.numel()
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0).to(self._block)
        if count > len(self._block) - PLACES:  # embeddings and head, which stay in 16 bit
            return self._normal(shape, self._block.device, self._block.dtype)
        start = BLOCK * self._start.randrange(PLACES // BLOCK)
        return self._block[start : start + count].view(shape)

    def _normal(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(0, STD, generator=self._generator)


def build_random_base(shape: Shape, device: torch.device) -> Any:
    """The base of this shape with random weights, in NF4 and bf16, as `train` would load it."""
    config = hub_config(shape)
    largest = max(
        module.in_features * module.out_features
        for name, module in model_on_meta(config).named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    )
    return build_base(config, device, RandomWeights(largest, device, torch.bfloat16))


def build_base(config: Any, device: torch.device, weights: Weights) -> Any:
    """The frozen, quantized base of a transformers config with these weights, as `train` quantizes by default."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    config = deepcopy(config)
    disable_dropout(config)
    model = model_on_meta(config, dtype=torch.bfloat16)
    quantization = quantization_of(ModelOptions())
    assert quantization is not None
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**quantization), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": device})
    _fill(model, weights, device)
    _compute_buffers(model, config, device)
    quantizer.postprocess_model(model=model)
    model.hf_quantizer = quantizer
    model.requires_grad_(False)
    keep_cpu_layers_differentiable(model)
    return model.eval()


def _fill(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Give every parameter its values; those of 4-bit layers are quantized one by one, as transformers does it."""
    for path, old in list(model.named_parameters()):
        owner, _, name = path.rpartition(".")
        values = weights(path, old.shape).to(device)
        if isinstance(old, Params4bit):
            new: nn.Parameter = Params4bit(values, requires_grad=False, **old.__dict__).to(device)
        else:
            new = nn.Parameter(values.clone(), requires_grad=False)
        setattr(model.get_submodule(owner), name, new)


def _compute_buffers(model: nn.Module, config: Any, device: torch.device) -> None:
    """Replace modules whose buffers have no values yet (rotary positions): they compute them from the config."""
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            computed: Any = type(module)
            model.set_submodule(path, computed(config).to(device))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"without values: {left}"
