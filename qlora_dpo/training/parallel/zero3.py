"""ZeRO-3: each process holds a part of the frozen base's weights, and the whole adapter.

DeepSpeed partitions the weights of the linear layers (`deepspeed.zero.Init`) and brings them together again. Its engine
is not used: it would own backward, clipping, the optimizer's step and the checkpoints. So a linear layer gathers its
weight itself, where it is read, once forward and once backward, and keeps nothing of it in between.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.errors import ModelError
from qlora_dpo.models.activation_checkpointing import decoder_layers
from qlora_dpo.models.experts import count_experts
from qlora_dpo.models.fused_lora import dense_weight


def partition(model: nn.Module, device: torch.device) -> None:
    """Partition a policy that lies in CPU memory over the devices of the processes, layer by layer.

    The linear layers in decoder layers are partitioned. Embedding, head, norms and quantization constants stay whole.

    Raises:
        ModelError: the layers hold experts, which are no linear layers.
    """
    if count_experts(model).weights:
        raise ModelError(
            "the base is a mixture of experts, whose stacks of weights ZeRO-3 here would keep whole on every GPU. Use "
            "rlhf/accelerate/fsdp_qlora.yaml."
        )
    # DeepSpeed asks the environment where it is; a scheduler may show each process its own GPU only.
    os.environ |= {"LOCAL_RANK": str(device.index or 0), "DS_ACCELERATOR": device.type}
    from deepspeed import ops, zero

    ops.__compatible_ops__ = defaultdict(bool)  # none of its operators is needed, so none is looked for or compiled
    for layer in decoder_layers(model):
        layer.to(device)
        linears = [module for name, module in layer.named_modules()
                   if isinstance(module, nn.Linear) and "lora_" not in name]  # fmt: skip
        zero.Init(module=nn.ParameterList(linear.weight for linear in linears), mem_efficient_linear=False)
        for linear in linears:
            _gather_where_read(linear)
    model.to(device)


def _gather_where_read(linear: Any) -> None:
    linear.gathered = partial(_gathered, linear.weight)
    linear.forward = partial(_forward, linear, linear.forward)


@contextmanager
def _gathered(weight: Any) -> Iterator[None]:
    """Within this block the weight is whole; all processes enter it in the same order."""
    weight.all_gather_coalesced([weight]).wait()
    try:
        yield
    finally:
        weight.partition()


def _forward(linear: Any, forward: Any, x: Tensor) -> Tensor:
    output: Tensor = _GatheredLinear.apply(x, linear, forward)
    return output


class _GatheredLinear(torch.autograd.Function):
    """y = linear(x); bitsandbytes' own function would keep the gathered weight until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any, forward: Any) -> Tensor:
        ctx.linear = linear
        with linear.gathered():
            output: Tensor = forward(x)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ dense_weight(ctx.linear, grad.dtype), None, None
