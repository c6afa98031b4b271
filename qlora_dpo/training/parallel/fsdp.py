"""FSDP: each process holds a part of every layer's weights, adapter and optimizer state, and gathers a layer's weights
while it runs.

torch's `fully_shard` (FSDP2) shards each decoder layer and the decoder around them; the head stays whole. It gathers
weights byte by byte, so NF4 needs no storage in a float type. Gradients are summed over the processes once per step.
What is saved is whole: checkpoints of sharded and other runs continue each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qlora_dpo.models.activation_checkpointing import decoder_layers
from qlora_dpo.models.lora import adapter_weights, trainable_parameters


def shard(model: Any, device: torch.device, count: int) -> None:
    """Shard a policy that lies in CPU memory over the devices of `count` processes, layer by layer."""
    causal_lm = model.get_base_model()
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    mesh = init_device_mesh(device.type, (count,))
    for part in (*decoder_layers(decoder), decoder):
        part.to(device)
        fully_shard(part, mesh=mesh)
        part.set_force_sum_reduction_for_comms(True)  # each loss is divided by the pairs of the whole step already
        part.set_gradient_divide_factor(1.0)
    model.to(device)


def synchronize(model: nn.Module, is_last: bool) -> None:
    """Reduce the gradients in the backward pass to come, or leave that to the last one of the step."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(is_last, recurse=False)


def whole(value: Any) -> Any:
    """A state without its tensors' sharding, on the CPU; every process takes part."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    return [whole(part) for part in value] if isinstance(value, list) else value


def restore_adapter(model: Any, weights: dict[str, Tensor]) -> None:
    """Load whole weights, by PEFT's names, into a sharded adapter.

    Raises:
        KeyError: one is missing.
    """
    with torch.no_grad():
        for name, target in adapter_weights(model).items():
            target.copy_(_like(target, weights[name]))


def sharded_moments(optimizer: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """An optimizer's whole state, sharded as these parameters are."""
    state = {
        number: {
            name: _like(parameters[number], value) if torch.is_tensor(value) and value.dim() else value
            for name, value in moments.items()
        }
        for number, moments in optimizer["state"].items()
    }
    return optimizer | {"state": state}


def is_sharded(model: nn.Module) -> bool:
    """Whether the policy's adapter is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in trainable_parameters(model))


def _like(target: Any, value: Tensor) -> Tensor:
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
