"""What the forward pass keeps for the backward pass, per decoder layer.

`none` keeps everything. `selective` runs the layer again, but keeps the outputs of what is dear, the base's matrix
products and attention, so that only norms, activations and the adapter's small products are recomputed. `full` keeps
the layer's input only and runs the whole layer again (arXiv 1604.06174). `offload` is `full` with the inputs in CPU
memory between forward and backward; on a CPU it is `full`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qlora_dpo.models.text_model import text_model

Level = Literal["none", "selective", "full", "offload"]
LEVELS: tuple[Level, ...] = get_args(Level)  # each recomputes or moves more than the one before it, and keeps less


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that can be checkpointed, in the model's order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in text_model(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def set_activation_checkpointing(model: nn.Module, levels: Level | Sequence[Level]) -> int:
    """Set one level on every decoder layer, or one level for each; returns the number of layers.

    Raises:
        ValueError: a sequence that is not one level per decoder layer.
    """
    layers: list[Any] = decoder_layers(model)
    per_layer: Sequence[Level] = [levels] * len(layers) if isinstance(levels, str) else levels
    if len(per_layer) != len(layers):
        raise ValueError(f"{len(per_layer)} levels for {len(layers)} decoder layers")
    run_again = {level: _run_again(level) for level in {*per_layer}}
    for layer, level in zip(layers, per_layer, strict=True):
        layer.gradient_checkpointing = level != "none"
        layer._gradient_checkpointing_func = run_again[level]
    return len(layers)


def _run_again(level: Level) -> Callable[..., Any]:
    """The function that transformers calls as `f(layer_with_its_keywords, *inputs)`."""
    if level == "selective":
        policy = partial(_policy, _dear_operations())
        return partial(
            checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
        )
    again = partial(checkpoint, use_reentrant=False)
    return partial(_with_inputs_in_cpu_memory, again) if level == "offload" else again


def _with_inputs_in_cpu_memory(again: Callable[..., Any], layer: Callable[..., Any], *inputs: Any) -> Any:
    # Within the layer the checkpoint's own hooks are in force, so these see its saved inputs only. Both copies are
    # queued on the stream of the computation: nothing has to wait for them, and nothing can overtake them.
    with save_on_cpu(pin_memory=True) if _is_on_gpu(inputs) else nullcontext():
        return again(layer, *inputs)


def _is_on_gpu(inputs: Sequence[Any]) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.is_cuda for tensor in inputs)


def _policy(kept: set[Any], _context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _dear_operations() -> set[Any]:
    """Operations whose outputs are kept, as far as this torch and bitsandbytes register them."""
    names = (
        "bitsandbytes.gemm_4bit",
        "aten._grouped_mm",
        "torch_attn._varlen_attn",
        "aten._scaled_dot_product_flash_attention_for_cpu",
        "aten._scaled_dot_product_flash_attention",
        "aten._scaled_dot_product_efficient_attention",
        "aten._scaled_dot_product_cudnn_attention",
    )
    found = set()
    for name in names:
        namespace, operation = name.split(".")
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            found |= {getattr(packet, overload) for overload in packet.overloads()}
    return found
