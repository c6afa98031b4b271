"""What an adapter adds to its base, layer by layer, by PEFT's own formulas in float32; the base is not loaded."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_dpo.errors import ModelError
from qlora_dpo.models.lora import POLICY, does_not_fit, unknown_names

_OWN = f".modules_to_save.{POLICY}."


class AdapterUpdates:
    """A saved LoRA adapter on a model without weights.

    Raises:
        ModelError: it does not fit the model, or adds what is not merged here.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self.folder = folder
        policy = _with_adapter(model, folder)
        base = policy.get_base_model()
        self.keeps_ties = bool(policy.peft_config[POLICY].ensure_weight_tying)
        """Where both of two tied weights have an adapter, it is one and the same."""
        self.layers: dict[str, Any] = {
            _parameter_of(name, module): module
            for name, module in base.named_modules()
            if isinstance(module, LoraLayer)
        }
        """By the parameter that each one adapts."""
        self.biases: dict[str, Tensor] = {}
        """What lora_bias adds, by parameter."""
        self.replaced: dict[str, Tensor] = _trained_wholly(base)
        """Parameters of which the adapter brings its own, such as modules_to_save."""
        for parameter, layer in self.layers.items():
            self._prepare(parameter, layer)

    @property
    def changed(self) -> set[str]:
        """The parameters that the merge changes."""
        return self.layers.keys() | self.biases.keys() | self.replaced.keys()

    def merged(self, parameter: str, base: Tensor) -> Tensor:
        """The merged parameter, in float32; `base` is left as it is.

        Raises:
            ModelError: it comes out with a NaN or an infinity.
        """
        start = self.replaced[parameter].float() if parameter in self.replaced else base
        if parameter in self.biases:
            return start + self.biases[parameter]
        if parameter not in self.layers:
            return start
        layer, name = self.layers[parameter], parameter.rpartition(".")[2]
        module = layer.get_base_layer()
        empty = getattr(module, name)
        setattr(module, name, nn.Parameter(start, requires_grad=False))
        try:
            layer.merge(safe_merge=True)
            merged: Tensor = getattr(module, name).data
            return merged
        except ValueError as error:
            raise ModelError(f"{self.folder}: {parameter} cannot be merged: {error}") from error
        finally:
            setattr(module, name, empty)
            layer.merged_adapters.clear()

    def _prepare(self, parameter: str, layer: Any) -> None:
        name, _, own = parameter.rpartition(".")
        module = layer.get_base_layer()
        if not isinstance(getattr(module, own, None), nn.Parameter):
            raise ModelError(
                f"{self.folder}: {name} ({type(layer).__name__}) is not one weight with an adapter of its own, which "
                "is all that is merged here. Merge it with PEFT."
            )
        if not layer.lora_bias.get(POLICY):
            return
        if getattr(module, "bias", None) is None:
            raise ModelError(
                f"{self.folder}: lora_bias trained a bias of {name}, which has none in the base, so no plain model "
                "holds it. Release the adapter alone."
            )
        layer.lora_bias[POLICY] = False  # added to the bias, which is streamed apart from the weight
        self.biases[f"{name}.bias"] = layer.lora_B[POLICY].bias.data.float() * layer.scaling[POLICY]


def _parameter_of(name: str, layer: Any) -> str:
    """The parameter that a LoRA layer of this name adapts: a weight, or experts (whose layers are nested)."""
    return f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter's real weights on it; its own stay without content.

    PEFT moves an adapter to where the base is, to nowhere in this case; so it is loaded twice, the second time into
    parameters that have been made for it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Found missing adapter keys")
            policy = PeftModel.from_pretrained(model, str(folder), adapter_name=POLICY, low_cpu_mem_usage=True)
            for module in policy.modules():
                if isinstance(module, LoraLayer):
                    _make_room(module)
            found: Any = set_peft_model_state_dict(policy, load_file(folder / "adapter_model.safetensors"), POLICY)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise does_not_fit(folder, str(error)) from error
    if unknown := unknown_names(found.unexpected_keys):
        raise does_not_fit(folder, f"it has {unknown[0]}, and the base has no such layer")
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing:
        raise does_not_fit(folder, f"it has nothing for {missing[0]}")
    return policy


def _make_room(layer: Any) -> None:
    for name in layer.adapter_layer_names:
        part = getattr(layer, name, None)
        if isinstance(part, nn.Module):
            part.to_empty(device="cpu")


def _trained_wholly(base: Any) -> dict[str, Tensor]:
    """Every parameter of the base that the adapter's file has brought."""
    wrappers = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper))
    found = {}
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        if tensor.is_meta or "lora_" in name or (name.startswith(wrappers) and _OWN not in name):
            continue
        found[name.replace(_OWN, ".").replace(".base_layer.", ".")] = tensor.data
    return found
