"""Which activation checkpointing each layer gets: the least recomputation that the memory allows."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlora_dpo.config.training import TrainConfig, quantization_of
from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.dataset import ConversationDataset
from qlora_dpo.data.packing import LayoutKind, Sample
from qlora_dpo.errors import ModelError
from qlora_dpo.models.activation_checkpointing import Level, decoder_layers
from qlora_dpo.models.lora import POLICY
from qlora_dpo.models.memory import OPTIMIZER_BYTES, Activations, count_activations
from qlora_dpo.models.skeleton import Skeleton, build_skeleton
from qlora_dpo.training.data import TrainingData
from qlora_dpo.training.engine import DEFAULT_MAX_TOKENS
from qlora_dpo.training.memory.device_memory import device_memory
from qlora_dpo.training.optimizers import optimizer_name
from qlora_dpo.training.parallel.ranks import ALONE, Ranks

RESERVE = 0.1  # of a GPU's free memory, for what its allocator cannot use
CPU_SHARE = 0.8  # of the available memory: other programs need some too
GPU_TOKENS = 4096  # enough that dequantizing the weights costs little beside multiplying with them
UNCOUNTED: Level = "selective"  # for architectures that cannot be counted


@dataclass(frozen=True)
class MadePair:
    """A pair of some length, for layouts in which only lengths matter."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]


@dataclass(frozen=True)
class PairLengths:
    """Tokens of the prompt, the chosen and the rejected answer of every pair, each an array [pairs]."""

    prompt: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]

    def costs(self, kind: LayoutKind) -> NDArray[np.int64]:
        """Tokens that each pair puts through the model."""
        if kind == "shared":
            return self.prompt + self.chosen + self.rejected - 2
        return 2 * (self.prompt + np.maximum(self.chosen, self.rejected) - 1)

    def mean(self) -> tuple[float, float, float]:
        """Mean lengths of prompt, chosen and rejected."""
        return float(self.prompt.mean()), float(self.chosen.mean()), float(self.rejected.mean())

    @property
    def targets(self) -> NDArray[np.int64]:
        """Tokens of each pair that are predicted."""
        return self.chosen + self.rejected

    @property
    def shared(self) -> NDArray[np.int64]:
        """Tokens of each pair that the shared layout puts through the model once instead of twice."""
        return self.prompt

    def made(self, tokens: int, kind: LayoutKind) -> Sequence[Sample]:
        """Pairs of these lengths that put about `tokens` tokens through the model."""
        return made_pairs(tokens, kind, self.mean())


@dataclass(frozen=True)
class ConversationLengths:
    """Tokens of every conversation, those before its first learned one, and those learned, each an array [samples]."""

    tokens: NDArray[np.int64]
    prompt: NDArray[np.int64]
    targets: NDArray[np.int64]

    def costs(self, kind: LayoutKind) -> NDArray[np.int64]:
        """Tokens that each conversation puts through the model, in either layout."""
        return self.tokens - 1

    @property
    def shared(self) -> NDArray[np.int64]:
        """No conversation shares anything."""
        return np.zeros_like(self.tokens)

    def made(self, tokens: int, kind: LayoutKind) -> Sequence[Sample]:
        """Conversations of these lengths, learned in one turn, that put `tokens` tokens through the model."""
        cost, learned = float(self.costs(kind).mean()), float(self.targets.sum() / self.tokens.sum())
        count = min(max(1, round(tokens / cost)), max(1, tokens // 2))
        lengths = [tokens // count + (number < tokens % count) + 1 for number in range(count)]
        return [
            TokenizedConversation([0] * length, [min(length - 1, max(1, round(length * (1 - learned)))), length])
            for length in lengths
        ]


Lengths = PairLengths | ConversationLengths


def lengths_of(data: TrainingData, indices: Sequence[int]) -> Lengths:
    """The lengths of these samples."""
    columns = zip(*(source.lengths() for source in data.sources), strict=True)
    lengths = ConversationLengths if isinstance(data.sources[0], ConversationDataset) else PairLengths
    return lengths(*(np.concatenate(column)[list(indices)] for column in columns))


def largest_micro_batch(lengths: Lengths | None, kind: LayoutKind, budget: int, pairs_per_step: int) -> int:
    """Tokens of the largest micro-batch that this budget can lead to; without data the budget itself."""
    if lengths is None:
        return budget
    costs = np.sort(lengths.costs(kind))
    return max(int(costs[-1]), min(budget, int(costs[-pairs_per_step:].sum())))


def made_pairs(tokens: int, kind: LayoutKind, lengths: tuple[float, float, float]) -> list[MadePair]:
    """Pairs that put `tokens` tokens through the model (padded: two fewer at most), shaped like these mean lengths."""
    prompt, chosen, rejected = lengths
    cost = prompt + chosen + rejected - 2 if kind == "shared" else 2 * (prompt + max(chosen, rejected) - 1)
    count = min(max(1, round(tokens / cost)), max(1, tokens // 4))
    pairs = []
    for number in range(count):
        own = tokens // count + (number < tokens % count)
        own = own if kind == "shared" else own // 2
        completions = 2 if kind == "shared" else 1
        start = max(1, min(own - completions, round(own * prompt / (prompt + (chosen + rejected) * completions / 2))))
        first = (own - start) // completions
        second = own - start - first if kind == "shared" else first
        pairs.append(MadePair([0] * start, [0] * (first + 1), [0] * (second + 1)))
    return pairs


def choose_levels(counted: Activations, free: float) -> tuple[Level, ...]:
    """One level per layer whose peak fits into `free` bytes, with as little recomputation as possible.

    All layers `none`; then as many as needed `selective`, then `full`, then `offload`: two neighboring levels at a
    time, the frugal one on the first layers, whose turn comes when the others' memory is free again. Where nothing
    fits, the most frugal.
    """
    order = list(counted.layers)
    layers = len(counted.layers["none"])
    for generous, frugal in pairwise(order):
        for count in range(layers + 1):
            levels = (frugal,) * count + (generous,) * (layers - count)
            if counted.peak(levels) <= free:
                return levels
    return (order[-1],) * layers


def describe(levels: Sequence[Level]) -> str:
    """`full on 20 layers, none on 40`."""
    counts = Counter(levels)
    if len(counts) == 1:
        return f"{levels[0]} on all {len(levels)} layers"
    return ", ".join(f"{level} on {count} layers" for level, count in counts.items())


def trained_bytes(skeleton: Skeleton, optimizer: str) -> tuple[int, int]:
    """Bytes of the adapter's gradients and of the optimizer's states."""
    return skeleton.adapter_bytes, round(skeleton.adapter_parameters * OPTIMIZER_BYTES[optimizer])


def asked_tokens(config: TrainConfig, device_type: str) -> int:
    """The token budget of a micro-batch that levels are chosen for."""
    default = GPU_TOKENS if device_type == "cuda" else DEFAULT_MAX_TOKENS
    return config.training.max_tokens_per_microbatch or default


def available_cpu_memory() -> int:
    """Bytes that programs can still get, as the kernel estimates them."""
    import psutil

    return int(psutil.virtual_memory().available)


def free_after_loading(device: torch.device) -> float:
    """Bytes of the device that training may take now that the model is on it."""
    memory = device_memory(device)
    return CPU_SHARE * available_cpu_memory() if memory is None else (1 - RESERVE) * memory.free()


def levels_of_run(
    config: TrainConfig, policy: Any, kind: LayoutKind, data: TrainingData, device: torch.device, ranks: Ranks = ALONE
) -> Level | tuple[Level, ...]:
    """The levels of a run whose model is loaded: what --activation_checkpointing says, or for auto what fits into the
    least memory that a process has, because where the base is sharded levels decide what all of them exchange."""
    asked = config.training.activation_checkpointing
    if asked != "auto":
        return asked
    adapter = policy.peft_config[POLICY]
    base = policy.get_base_model()
    try:
        skeleton = build_skeleton(
            _plain_config(base.config), quantization=quantization_of(config.model), dtype=base.dtype, r=adapter.r,
            target_modules=list_of_targets(adapter.target_modules),
            target_parameters=sorted(adapter.target_parameters or ()), rank_pattern=adapter.rank_pattern,
            trust_remote_code=config.model.trust_remote_code,
        )  # fmt: skip
        if len(skeleton.kinds) != len(decoder_layers(policy)):
            raise ModelError(f"{type(base).__name__} has layers outside its decoder. Set --activation_checkpointing.")
        lengths = lengths_of(data, data.train)
        tokens = largest_micro_batch(lengths, kind, asked_tokens(config, device.type), config.pairs_per_step)
        free = min(ranks.gather(free_after_loading(device)))
        free -= sum(trained_bytes(skeleton, optimizer_name(config.training.optim, device.type)))
        counted = count_as_needed(skeleton, lengths.made(tokens, kind), kind, device.type, free)
    except ModelError as error:
        print(f"Activation checkpointing: {UNCOUNTED}; {error}", file=sys.stderr)
        return UNCOUNTED
    levels = choose_levels(counted, free)
    peak = counted.peak(levels)
    print(
        f"Activation checkpointing: {describe(levels)} (predicted: {_gib(peak)} of {_gib(free)} GiB, {tokens} tokens "
        "at once)",
        file=sys.stderr,
    )
    if peak > free:
        print("That is more than is free: smaller micro-batches or a smaller --lora_r may be needed.", file=sys.stderr)
    return levels


def count_as_needed(
    skeleton: Skeleton, samples: Sequence[Sample], kind: LayoutKind, device_type: str, free: float
) -> Activations:
    """The activations without checkpointing, and at the other levels only where those do not fit into `free` bytes.

    Raises:
        ModelError: they cannot be counted.
    """
    generous: Level = "none"
    counted = count_activations(skeleton, samples, kind, device_type, [generous])
    if counted.peak([generous] * len(skeleton.kinds)) <= free:
        return counted
    return count_activations(skeleton, samples, kind, device_type)


def list_of_targets(target_modules: Any) -> list[str]:
    """An adapter's target modules by name.

    Raises:
        ModelError: they are a pattern.
    """
    if isinstance(target_modules, str):
        raise ModelError(f"the adapter's target_modules are a pattern ({target_modules}), which is not counted.")
    return sorted(target_modules)


def _plain_config(config: Any) -> Any:
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton is quantized by the options
    return config


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
