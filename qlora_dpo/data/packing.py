"""Cuts the pairs of an optimizer step into micro-batches and lays each one out for the model.

The shared layout is one row without padding. Each pair contributes its prompt once, then chosen, then rejected;
both completions continue the prompt's positions:

    ids        p0 p1 p2 | c0 c1 | r0 r1 r2 | p0 p1 ...
    positions   0  1  2 |  3  4 |  3  4  5 |  0  1 ...

The token at position i predicts the one at i + 1, so the last prompt token predicts c0 and r0, and the last token
of a completion predicts nothing: it is a target only and never enters the model.

The padded layout is one right-padded row per completion with its prompt repeated, for the architectures that
cannot share a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

LayoutKind = Literal["shared", "padded"]


class Pair(Protocol):
    """Token ids of a preference pair; completions are not empty, neither is the prompt."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def chosen_ids(self) -> Sequence[int]: ...
    @property
    def rejected_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Segment:
    """A run of queries that attends to a prefix elsewhere in the row and causally to itself."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class PackedLayout:
    """Who attends to whom in the single row of a shared micro-batch of T tokens.

    `key_index` [K] lists the rows of keys and values that the segments read, in order (K = T plus one copy of every
    prompt that a second completion shares); `cu_seq_q` and `cu_seq_k` [S + 1] are the segments' borders in it.
    """

    segments: tuple[Segment, ...]
    key_index: Tensor
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int

    def to(self, device: torch.device) -> PackedLayout:
        """The same layout with its tensors on `device`."""
        return replace(
            self,
            key_index=self.key_index.to(device, non_blocking=True),
            cu_seq_q=self.cu_seq_q.to(device, non_blocking=True),
            cu_seq_k=self.cu_seq_k.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of B pairs, ready for the model.

    `input_ids`, `position_ids` [rows, T]. `predictor_index` [N] points into the flattened rows at the token that
    predicts `target_ids` [N]; the N completion tokens are ordered chosen_0, rejected_0, chosen_1, ... and
    `completion_lengths` [2B] counts them. `layout` is None in the padded form, which has an `attention_mask`.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictor_index: Tensor
    target_ids: Tensor
    completion_lengths: tuple[int, ...]
    layout: PackedLayout | None = None
    attention_mask: Tensor | None = None

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`."""
        return PackedBatch(
            self.input_ids.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            self.predictor_index.to(device, non_blocking=True),
            self.target_ids.to(device, non_blocking=True),
            self.completion_lengths,
            None if self.layout is None else self.layout.to(device),
            None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True),
        )


def token_cost(pair: Pair, kind: LayoutKind) -> int:
    """Tokens that a pair puts through the model: the prompt once (shared) or twice (padded)."""
    prompt, chosen, rejected = len(pair.prompt_ids), len(pair.chosen_ids) - 1, len(pair.rejected_ids) - 1
    if kind == "shared":
        return prompt + chosen + rejected
    return 2 * (prompt + max(chosen, rejected))


def batch_cost(pairs: Sequence[Pair], kind: LayoutKind) -> int:
    """Tokens that a micro-batch of these pairs puts through the model, padding included."""
    costs = [token_cost(pair, kind) for pair in pairs]
    return sum(costs) if kind == "shared" else len(costs) * max(costs)


def cut(pairs: Sequence[Pair], max_tokens: int, kind: LayoutKind, group: int = 1) -> list[list[int]]:
    """Cut a step's pairs into micro-batches of at most `max_tokens`, as lists of indices into `pairs`.

    First-fit decreasing fills the budgets; a pair above the budget gets a micro-batch of its own. With `group` > 1
    each run of that many consecutive pairs stays together, for losses that couple the pairs of a group.
    """
    groups = [list(range(start, min(start + group, len(pairs)))) for start in range(0, len(pairs), group)]
    groups.sort(key=lambda members: -batch_cost([pairs[i] for i in members], kind))
    bins: list[list[int]] = []
    for members in groups:
        for candidate in bins:
            if batch_cost([pairs[i] for i in candidate + members], kind) <= max_tokens:
                candidate += members
                break
        else:
            bins.append(list(members))
    return [sorted(members) for members in bins]


def pack(pairs: Sequence[Pair], kind: LayoutKind) -> PackedBatch:
    """Lay the pairs out for one forward pass."""
    return _pack_shared(pairs) if kind == "shared" else _pack_padded(pairs)


def _pack_shared(pairs: Sequence[Pair]) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    segments: list[Segment] = []
    for pair in pairs:
        start, prompt = len(ids), len(pair.prompt_ids)
        ids += pair.prompt_ids
        positions += range(prompt)
        for completion in (pair.chosen_ids, pair.rejected_ids):
            own = len(ids)
            ids += completion[:-1]
            positions += range(prompt, prompt + len(completion) - 1)
            predictors += [start + prompt - 1, *range(own, own + len(completion) - 1)]
            targets += completion
            lengths.append(len(completion))
        segments.append(Segment(start, prompt + len(pair.chosen_ids) - 1))
        if len(pair.rejected_ids) > 1:
            rejected_start = start + prompt + len(pair.chosen_ids) - 1
            segments.append(Segment(rejected_start, len(pair.rejected_ids) - 1, start, prompt))
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        predictor_index=torch.tensor(predictors),
        target_ids=torch.tensor(targets),
        completion_lengths=tuple(lengths),
        layout=_layout(segments),
    )


def _layout(segments: list[Segment]) -> PackedLayout:
    keys = [
        torch.cat([
            torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length),
            torch.arange(segment.start, segment.start + segment.length),
        ])
        for segment in segments
    ]  # fmt: skip
    q_lengths = torch.tensor([segment.length for segment in segments])
    k_lengths = torch.tensor([len(key) for key in keys])
    borders = [torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32) for lengths in (q_lengths, k_lengths)]
    return PackedLayout(
        tuple(segments), torch.cat(keys), borders[0], borders[1], int(q_lengths.max()), int(k_lengths.max())
    )


def _pack_padded(pairs: Sequence[Pair]) -> PackedBatch:
    rows = [
        [*pair.prompt_ids, *completion[:-1]] for pair in pairs for completion in (pair.chosen_ids, pair.rejected_ids)
    ]
    completions = [completion for pair in pairs for completion in (pair.chosen_ids, pair.rejected_ids)]
    width = max(len(row) for row in rows)
    predictors: list[int] = []
    for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        end = number * width + len(row)
        predictors += range(end - len(completion), end)
    return PackedBatch(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        position_ids=torch.arange(width).expand(len(rows), width),
        predictor_index=torch.tensor(predictors),
        target_ids=torch.tensor([token for completion in completions for token in completion]),
        completion_lengths=tuple(len(completion) for completion in completions),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    )
