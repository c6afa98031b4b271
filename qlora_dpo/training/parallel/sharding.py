"""A base of which each process holds a part, by what the launcher asks for: FSDP or ZeRO-3."""

from __future__ import annotations

from typing import Any

import torch

from qlora_dpo.models.lora import adapter_weights, trainable_parameters
from qlora_dpo.training.parallel.ranks import Ranks


def shard_policy(model: Any, device: torch.device, ranks: Ranks) -> None:
    """Give each process its part of a policy that lies in CPU memory.

    Raises:
        ModelError: the processes do not begin with the same adapter.
    """
    start = [float(parameter.detach().double().sum()) for parameter in trainable_parameters(model)]
    ranks.refuse_differences(start, "an adapter to start from")
    if ranks.is_zero3:
        from qlora_dpo.training.parallel.zero3 import partition

        partition(model, device)
    else:
        from qlora_dpo.training.parallel.fsdp import shard

        shard(model, device, ranks.count)


def whole_adapter(model: Any, ranks: Ranks) -> dict[str, Any] | None:
    """The adapter's weights by PEFT's names where each process holds a part of them; every process takes part."""
    if not ranks.shards_adapter:
        return None
    from qlora_dpo.training.parallel.fsdp import whole

    weights: dict[str, Any] = whole(adapter_weights(model))
    return weights
