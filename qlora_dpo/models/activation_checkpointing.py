"""What the forward pass keeps for the backward pass, per decoder layer.

`none` keeps everything. `full` keeps each layer's input and runs the layer again (arXiv 1604.06174). `selective`
runs it again too, but keeps the outputs of what is dear, the base's matrix products and attention, so that only
norms, activations and the adapter's small products are recomputed.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Level = Literal["none", "selective", "full"]


def set_activation_checkpointing(model: nn.Module, level: Level) -> int:
    """Set the level on every decoder layer; returns the number of layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    run_again = partial(checkpoint, use_reentrant=False)
    if level == "selective":
        kept = _dear_operations()
        run_again = partial(run_again, context_fn=lambda: create_selective_checkpoint_contexts(partial(_policy, kept)))
    for layer in layers:
        layer.gradient_checkpointing = level != "none"
        layer._gradient_checkpointing_func = run_again
    return len(layers)


def _policy(kept: set[Any], _context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _dear_operations() -> set[Any]:
    """Operations whose outputs are kept, as far as this torch and bitsandbytes register them."""
    names = (
        "bitsandbytes.gemm_4bit",
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
