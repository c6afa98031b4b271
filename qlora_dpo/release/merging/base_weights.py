"""The tensors of a base, one at a time and by the checkpoint's own names: as they are stored, or as training held them.

Which tensor is which parameter, what is quantized, and in which type each one is held are asked of transformers, on a
model without weights; so they are what loading the base would do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.models import experts
from qlora_dpo.models.loading import check_cpu_quantizable, model_on_meta
from qlora_dpo.models.weight_files import weight_files
from qlora_dpo.release.merging.parts import Parts

SHOWN = 3  # names in a message
# vLLM refuses to run these in float16 (vllm/config/model.py, _FLOAT16_NOT_SUPPORTED_MODELS).
OVERFLOWING = {"gemma2", "gemma3", "gemma3_text", "plamo2", "glm4"}


@dataclass(frozen=True)
class Stored:
    """One tensor of the checkpoint, or several that make one quantized weight."""

    name: str
    parameter: str
    """The model's parameter that it is, or is a part of."""
    is_whole: bool
    """It is that parameter, one to one."""
    shape: tuple[int, ...]
    """Of the weight; a quantized one is stored in another shape."""
    companions: tuple[str, ...] = ()
    """What else is stored of a weight that comes quantized."""


def dtypes_of(config: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """In which type transformers holds each parameter and buffer of a model that is loaded in `dtype`: that one, but
    for those that the architecture wants in float32."""
    from transformers.core_model_loading import build_glob_alternation

    model = _plain_model(config, dtype)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    plan = model._get_dtype_plan(dtype)
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        found = {name: pattern.search(name) for name in types}
        types |= {name: plan[by_group[str(match.lastgroup)]] for name, match in found.items() if match}
    return types


class BaseWeights:
    """The base's tensors, read when they are asked for.

    Args:
        quantization: how training held the base, as keyword arguments of transformers' `BitsAndBytesConfig`, or None.
        dtype: the type in which it held the rest.
        device: on which it quantized; other devices may round other ties.

    Raises:
        StorageError: a file cannot be read.
        ModelError: the tensors are not those of the config; or the base comes quantized by something else than
            bitsandbytes.
    """

    def __init__(
        self, folder: Path, config: Any, *, quantization: Mapping[str, Any] | None, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.dtype, self.device = folder, config, dtype, device
        self._files = files_of_tensors(folder)
        self.model = _plain_model(config)
        """The model without weights, in float32."""
        self.dtypes = dtypes_of(config, dtype)
        """In which type training held each parameter that was not quantized."""
        self._quantizer = _quantizer(config, quantization)
        self.comes_quantized = self._quantizer is not None and self._quantizer.pre_quantized
        self._skeleton: Any = None
        if self._quantizer is not None and not self.comes_quantized:
            self._skeleton = _plain_model(config)
            self._quantizer.preprocess_model(model=self._skeleton, device_map=None)
        self.parts: Parts
        """What is stored in parts, such as experts."""
        self.tensors = self._placed()
        self.lost_parts = self._quantized_in_parts()
        """Weights that training held quantized and that are stored in parts which are not joined here."""

    @property
    def half_types(self) -> tuple[torch.dtype, ...]:
        """The 16-bit types that it can be stored in, first that of its largest tensor; float16 only where its family
        computes in that without overflowing."""
        largest = max(self.tensors, key=lambda tensor: math.prod(tensor.shape))
        if {self.config.model_type, self.config.get_text_config().model_type} & OVERFLOWING:
            return (torch.bfloat16,)
        types = (torch.bfloat16, torch.float16)
        return types[::-1] if self.stored_type(largest) == torch.float16 else types

    @property
    def is_held_as_stored(self) -> bool:
        """Training held what is stored, so both bases are one."""
        return self._quantizer is None and all(
            self.dtypes.get(tensor.parameter, type_) == type_
            for tensor in self.tensors
            if (type_ := self.stored_type(tensor)).is_floating_point
        )

    def check_holdable(self) -> None:
        """Refuse what `held` cannot form as training held it.

        Raises:
            ModelError: a weight was quantized that is not stored as one tensor.
            UsageError: its layers cannot be quantized rightly on a CPU.
        """
        if self.lost_parts:
            raise ModelError(
                f"{self.lost_parts[0]} was quantized in training, and its weight is stored in parts, so the base as "
                "training held it cannot be formed. Use --base original where there is one, or release the adapter "
                "alone."
            )
        if self._skeleton is not None and self.device.type == "cpu" and self._quantizer.quantized_element_size < 1:
            check_cpu_quantizable(self.config)

    def stored_type(self, tensor: Stored) -> torch.dtype:
        """The type of a weight in its file; one that comes quantized has none of its own."""
        if tensor.companions:
            return self.dtype
        type_: Any = _TYPES[self._slice(tensor.name).get_dtype()]
        return type_  # type: ignore[no-any-return]

    def stored(self, name: str) -> Tensor:
        """A tensor as it lies in its file."""
        with safe_open(self._files[name], "pt", backend="pread") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def original(self, tensor: Stored) -> Tensor:
        """The weight as it is stored; numbers in float32."""
        value = self.stored(tensor.name)
        return value.float() if value.is_floating_point() else value

    def held(self, tensor: Stored) -> Tensor:
        """The weight as training held it, dequantized where it was quantized; numbers in float32."""
        if not tensor.is_whole and self._is_quantized(tensor.parameter):
            return self.parts.apart(tensor.parameter, self.whole(tensor.parameter, as_held=True))[tensor.name]
        value = self.stored(tensor.name)
        if tensor.companions:
            return self._dequantized_as_stored(tensor, value)
        if self._is_quantized(tensor.parameter):
            return self._quantized_and_back(tensor.parameter, value)
        if not value.is_floating_point():
            return value
        return value.to(self.dtypes.get(tensor.parameter, value.dtype)).float()

    def whole(self, parameter: str, *, as_held: bool) -> Tensor:
        """A parameter that is stored in parts, as training held it or as it is stored; in float32."""
        parts = {name: self.stored(name) for name in self.parts.names[parameter]}
        if not as_held:
            return self.parts.joined(parameter, {name: part.float() for name, part in parts.items()})
        if self._is_quantized(parameter):
            return self._quantized_and_back(parameter, self.parts.joined(parameter, parts))
        dtype = self.dtypes[parameter]
        return self.parts.joined(parameter, {name: part.to(dtype).float() for name, part in parts.items()})

    def _is_quantized(self, parameter: str) -> bool:
        if self._skeleton is None or parameter not in self.dtypes:
            return False
        return bool(self._quantizer.param_needs_quantization(self._skeleton, parameter))

    def _quantized_and_back(self, parameter: str, value: Tensor) -> Tensor:
        operation = self._quantizer.get_quantize_ops()
        value = value.to(self.device, self.dtype)
        weight = operation.convert({parameter: value}, model=self._skeleton)[parameter]
        if value.dim() == experts.STACK_DIMENSIONS:
            return _dequantized(weight).view(value.shape)
        module = self._skeleton.get_submodule(parameter.rpartition(".")[0])
        if hasattr(module, "quant_state"):
            module.quant_state = None  # bitsandbytes keeps it there, for every layer that was quantized
        plain = _dequantized(weight)
        return plain.T.contiguous() if issubclass(module.source_cls, Conv1D) else plain

    def _dequantized_as_stored(self, tensor: Stored, value: Tensor) -> Tensor:
        from bitsandbytes.nn import Int8Params, Params4bit

        stem = tensor.name.removesuffix("weight")
        others = {name.removeprefix(stem): self.stored(name) for name in tensor.companions}
        if "SCB" in others:
            return _dequantized(Int8Params(value, requires_grad=False, CB=value, SCB=others["SCB"]))
        weight: Any = Params4bit.from_prequantized(value, others, device=self.device)
        if weight.quant_state.dtype == torch.float16:
            weight.quant_state.dtype = self.dtype  # as `leave_float16` does when it is loaded
        return _dequantized(weight)

    def _placed(self) -> tuple[Stored, ...]:
        """Where transformers would put each tensor."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        companions = _companions(self._files, self._quantizer) if self.comes_quantized else {}
        of_others = {name for names in companions.values() for name in names}
        placed, patterns = [], {}
        for name in self._files:
            if name in of_others:
                continue
            parameter, converter = rename_source_key(name, renamings, converters, prefix, state)
            if parameter not in state and name in state:
                parameter, converter = rename_source_key(name, [], [], prefix, state)
            is_whole = converter is None and parameter in state
            if converter is not None and parameter in state:
                patterns[name] = parameter, converter
            shape = tuple(state[parameter].shape if name in companions and is_whole else self._slice(name).get_shape())
            placed.append(Stored(name, parameter, is_whole, shape, tuple(companions.get(name, ()))))
            if is_whole and shape != tuple(state[parameter].shape):
                raise ModelError(
                    f"{self.folder}: {name} has the shape {list(shape)}, and config.json says "
                    f"{list(state[parameter].shape)}. Restore the base."
                )
        self.parts = Parts(self.model, patterns, {tensor.name: tensor.shape for tensor in placed})
        return tuple(placed)

    def _quantized_in_parts(self) -> list[str]:
        parts = {tensor.parameter: tensor for tensor in self.tensors if not tensor.is_whole}
        return sorted(
            name for name, part in parts.items()
            if part.companions or (self._is_quantized(name) and name not in self.parts.separable)
        )  # fmt: skip

    def _slice(self, name: str) -> Any:
        with safe_open(self._files[name], "pt", backend="pread") as file:
            return file.get_slice(name)


def _plain_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model without weights and without quantization."""
    plain = deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return model_on_meta(plain, dtype=dtype)


def _quantizer(config: Any, quantization: Mapping[str, Any] | None) -> Any:
    """Transformers' own: that of a base that comes quantized, else that of the run, if any."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    own = getattr(config, "quantization_config", None)
    if not own:
        wanted = BitsAndBytesConfig(**quantization) if quantization else None
        with experts.quantizing():
            return wanted and AutoHfQuantizer.from_config(wanted, pre_quantized=False)
    quantizer = AutoHfQuantizer.from_config(own, pre_quantized=True)
    if not isinstance(quantizer, Bnb4BitHfQuantizer | Bnb8BitHfQuantizer):
        raise ModelError(
            f"the base comes quantized by {quantizer.quantization_config.quant_method}; only a base quantized by "
            "bitsandbytes can be merged into. Release the adapter alone."
        )
    return quantizer


def _dequantized(weight: Any) -> Tensor:
    from peft.utils.integrations import dequantize_bnb_weight

    plain = dequantize_bnb_weight(weight, state=SimpleNamespace(SCB=getattr(weight, "SCB", None)))
    return plain.cpu().float()


def _companions(names: Collection[str], quantizer: Any) -> dict[str, list[str]]:
    """For each weight that is stored quantized, the names of what is stored with it."""
    suffixes = [suffix for suffix in quantizer.serialized_names["weight"] if suffix != "weight"]
    found = defaultdict(list)
    for name in names:
        suffix = next((suffix for suffix in suffixes if name.endswith(f".{suffix}")), None)
        if suffix is not None:
            found[name.removesuffix(suffix) + "weight"].append(name)
    return dict(found)


def files_of_tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor, in the order in which they are stored.

    Raises:
        StorageError: a file cannot be read.
    """
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.offset_keys(), path)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path} cannot be read: {error}. Download or restore it.") from error
    return files
