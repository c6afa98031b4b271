"""How much memory training holds, counted on a model without weights.

A packed micro-batch runs forward and backward on the meta device while every allocation is followed: what is alive
after the forward pass are the activations that a layer keeps, what is alive at most is the peak. Numbers are bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_dpo.data.packing import LayoutKind, PackedBatch, Sample, pack
from qlora_dpo.errors import ModelError
from qlora_dpo.models.activation_checkpointing import Level, set_activation_checkpointing
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import Head, Scorer, why_not_shared
from qlora_dpo.models.skeleton import Skeleton, show_alike
from qlora_dpo.objectives.logps import CPU_TILE, GPU_TILE, chunked_logps

# Bytes per trained parameter; the 8-bit forms have two fp32 scales per 256 parameters and moment besides.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw_8bit": 2 + 2 * 4 / 256,
    "paged_adamw_32bit": 8.0,
}
META = torch.device("meta")
COUNTED: tuple[Level, ...] = ("none", "selective", "full")  # offload follows from full


@dataclass(frozen=True)
class Activations:
    """What one micro-batch of `tokens` tokens holds.

    `layers[level][n]` is what layer n keeps for its backward pass, `outside[level]` what embedding, last norm and
    log-probs keep, `working[level]` the most that is held beyond that at any moment, `head_tile` the part of it that
    the log-probs take alone. `host` is the CPU memory of one layer under `offload`.
    """

    tokens: int
    layers: Mapping[Level, tuple[int, ...]]
    outside: Mapping[Level, int]
    working: Mapping[Level, int]
    head_tile: int
    host: int

    def kept(self, levels: Sequence[Level]) -> int:
        """Bytes alive when the backward pass begins, with one level per layer."""
        return self.kept_outside(levels) + sum(self.layers[level][number] for number, level in enumerate(levels))

    def kept_outside(self, levels: Sequence[Level]) -> int:
        """The part of it that no layer keeps."""
        return max(self.outside[level] for level in levels)

    def peak(self, levels: Sequence[Level]) -> int:
        """The most that is held at once: each layer's backward works on top of what the layers up to it keep."""
        alive = self.kept(levels)
        peak = alive
        for number in reversed(range(len(levels))):
            peak = max(peak, alive + self.working[levels[number]])
            alive -= self.layers[levels[number]][number]
        return peak


def count_activations(
    skeleton: Skeleton, samples: Sequence[Sample], kind: LayoutKind, device_type: str, levels: Sequence[Level] = COUNTED
) -> Activations:
    """Follow one micro-batch of these samples at each of these levels, as a device of that type would run it.

    Raises:
        ModelError: the architecture cannot run in this layout, or needs data in its forward pass.
    """
    causal_lm = skeleton.policy.get_base_model()
    own_attention = causal_lm.config._attn_implementation
    reasons = [why_not_shared(causal_lm) if kind == "shared" else None]
    try:
        for batch in _on_meta(pack(samples, kind)) if reasons == [None] else []:
            try:
                return _count(skeleton, batch, kind, device_type, levels)
            except Exception as error:  # whatever the architecture's code raises without data
                reasons.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    finally:
        if own_attention is not None:
            causal_lm.set_attn_implementation(own_attention)
    why = next(reason for reason in reasons if reason)
    raise ModelError(
        f"what {type(causal_lm).__name__} keeps for its backward pass cannot be counted without data ({why}). Choose a "
        "level yourself with --activation_checkpointing."
    )


def _on_meta(batch: PackedBatch) -> list[PackedBatch]:
    """The forms of the batch to try. Where segments begin and end is read as data, so the layout stays. Padded rows
    come with a mask for every pair of tokens, which mask builders pass on without reading it, and as they are, for
    architectures that build their own from it."""
    batch = replace(batch.to(META), layout=batch.layout)
    if batch.attention_mask is None:
        return [batch]
    rows, width = batch.input_ids.shape
    return [replace(batch, attention_mask=torch.ones(rows, 1, width, width, dtype=torch.bool, device=META)), batch]


def _count(
    skeleton: Skeleton, batch: PackedBatch, kind: LayoutKind, device_type: str, levels: Sequence[Level]
) -> Activations:
    head = _Head.on(skeleton, device_type)
    with _as_on_a_device(keep_masks=device_type == "cpu" or kind == "padded"):
        head_tile = _count_head(head, batch, skeleton)
        passes = {
            level: [_count_pass(skeleton, number, batch, head, kind, level) for number in range(len(skeleton.samples))]
            for level in levels
        }
    layers = {level: tuple(counted[number].layer for number in skeleton.kinds) for level, counted in passes.items()}
    working = {level: max(one.working for one in counted) for level, counted in passes.items()}
    outside = {level: max(one.outside for one in counted) for level, counted in passes.items()}
    host = batch.input_ids.numel() * _hidden_size(skeleton) * skeleton.dtype.itemsize
    if "full" in levels and device_type != "cpu":
        layers["offload"] = tuple(max(0, layer - host) for layer in layers["full"])
        outside["offload"] = outside["full"]
        working["offload"] = working["full"] + host  # one layer's input comes back
    return Activations(batch.input_ids.numel(), layers, outside, working, head_tile, host)


class LiveBytes(TorchDispatchMode):
    """Within this block: `now` bytes of the storages made here are alive, `peak` at most; each counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def know(self, tensors: Sequence[Tensor]) -> None:
        """Do not count these: they were there before."""
        self._seen |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen.add(key)
            weakref.finalize(storage, self._gone, key, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class _Pass:
    """One layer kind at one level: what a layer keeps, what the rest keeps, and the most beyond both."""

    layer: int
    outside: int
    working: int


def _count_pass(
    skeleton: Skeleton, number: int, batch: PackedBatch, head: _Head, kind: LayoutKind, level: Level
) -> _Pass:
    show_alike(skeleton, number, layers=3)
    set_activation_checkpointing(skeleton.policy, level)
    policy = skeleton.policy.train()
    parameters = trainable_parameters(policy)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # gradients are counted with the adapter
    after_layer: list[int] = []
    live = LiveBytes()
    live.know([*policy.parameters(), *policy.buffers(), *(p.grad for p in parameters if p.grad is not None)])
    live.know([batch.input_ids, batch.position_ids, batch.predictor_index, batch.target_ids])
    mark = skeleton.samples[number].register_forward_hook(lambda *_: after_layer.append(live.now))
    try:
        with live:
            loss = Scorer(kind, head).per_token_logps(policy, batch).sum()
            kept = live.now
            torch.autograd.backward(loss)
    finally:
        mark.remove()
        policy.zero_grad(set_to_none=True)
    # Not the second minus the first: when a layer ends its input is still held, the embeddings' longer than others'.
    layer = after_layer[2] - after_layer[1]
    return _Pass(layer, kept - 3 * layer, live.peak - kept)


def _count_head(head: _Head, batch: PackedBatch, skeleton: Skeleton) -> int:
    """The most that the log-probs hold beyond what they keep."""
    tokens = batch.input_ids.numel()
    hidden = torch.empty(tokens, _hidden_size(skeleton), dtype=skeleton.dtype, device=META, requires_grad=True)
    live = LiveBytes()
    live.know([hidden, *skeleton.policy.parameters(), batch.predictor_index, batch.target_ids])
    with live:
        logps, _ = head.logps(hidden.index_select(0, batch.predictor_index), batch.target_ids, False)
        kept = live.now
    del logps
    return live.peak - kept


@dataclass(frozen=True)
class _Head(Head):
    """The head with the tiles of another device; two tiles of the vocabulary hold what all of them hold."""

    tile: tuple[int, int] = GPU_TILE

    @classmethod
    def on(cls, skeleton: Skeleton, device_type: str) -> _Head:
        module: nn.Module = skeleton.policy.get_base_model().get_output_embeddings()
        return cls(module, 1.0, None, CPU_TILE if device_type == "cpu" else GPU_TILE)

    def logps(self, hidden: Tensor, target_ids: Tensor, with_squares: bool) -> tuple[Tensor, Tensor | None]:
        tokens, vocabulary = self.tile
        weight: Tensor = self.module.weight[: 2 * vocabulary]  # type: ignore[index]
        return chunked_logps(hidden, weight, target_ids, token_chunk=tokens, vocab_chunk=vocabulary), None


@contextmanager
def _as_on_a_device(keep_masks: bool) -> Iterator[None]:
    """Within this block the meta device takes the paths that a real one takes.

    SDPA would take its reference path, which keeps T x T scores: it runs the operation that a CPU runs, which like
    CUDA's keeps queries, keys, values, output and logsumexp. Autocast, unknown to the meta device, is the CPU's.
    """
    sdpa, autocast = F.scaled_dot_product_attention, torch.autocast

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        mask = attn_mask.to(query.dtype) if keep_masks and attn_mask is not None else None
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output: Tensor = flash(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
        return output

    def cast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    try:
        F.scaled_dot_product_attention, torch.autocast = attend, cast  # type: ignore[assignment,misc]
        yield
    finally:
        F.scaled_dot_product_attention, torch.autocast = sdpa, autocast  # type: ignore[misc]


def _hidden_size(skeleton: Skeleton) -> int:
    return int(skeleton.policy.get_base_model().config.get_text_config().hidden_size)
