"""`modules_to_save`: whole modules, such as the embeddings, of which the adapter trains copies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from qlora_dpo.errors import UsageError


def refuse_unsavable(base: nn.Module, asked: Sequence[str]) -> None:
    """PEFT passes over a name that it does not find, and copies a quantized module, which cannot be trained.

    Raises:
        UsageError: naming the module.
    """
    names = dict(base.named_modules())
    for wanted in asked:
        found = [module for name, module in names.items() if f".{name}".endswith(f".{wanted}")]
        if not found:
            raise UsageError(
                f"--modules_to_save {wanted}: the model has no such module. Name one, such as embed_tokens or lm_head."
            )
        if not all(parameter.is_floating_point() for module in found for parameter in module.parameters()):
            raise UsageError(
                f"--modules_to_save {wanted}: it is quantized, and quantized weights cannot be trained. Name modules "
                "that are not (the embeddings, lm_head, norms), or an adapter's with --lora_target_modules."
            )


def train_in_float32(model: nn.Module, adapter: str) -> None:
    """Hold what is trained in fp32, in which small updates are not lost, and compute in the type of the base.

    PEFT copies a module in its own type. With the cast, a copy that has not been trained gives what the base gives.
    """
    from peft.utils import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save:
            for parameter in wrapper.modules_to_save[adapter].parameters():
                parameter.data = parameter.data.float()
            saved: Any = wrapper
            saved._forward_wrapped = partial(_forward, saved, saved._forward_wrapped, adapter)


def _forward(wrapper: Any, peft_forward: Any, adapter: str, *args: Any, **kwargs: Any) -> Any:
    from torch.func import functional_call

    if wrapper.active_adapters != [adapter]:
        return peft_forward(*args, **kwargs)
    module = wrapper.modules_to_save[adapter]
    types = {name: parameter.dtype for name, parameter in wrapper.original_module.named_parameters()}
    weights = {name: parameter.to(types[name]) for name, parameter in module.named_parameters()}
    return functional_call(module, weights, args, kwargs)
