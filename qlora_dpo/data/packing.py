"""Cuts the samples of an optimizer step into micro-batches and lays each one out for the model.

A sample is a preference pair, or a conversation of which the assistant's tokens are predicted. The shared layout is
one row without padding. Each pair contributes its prompt once, then chosen, then rejected; both completions continue
the prompt's positions:

    ids        p0 p1 p2 | c0 c1 | r0 r1 r2 | p0 p1 ...
    positions   0  1  2 |  3  4 |  3  4  5 |  0  1 ...

The token at position i predicts the one at i + 1, so the last prompt token predicts c0 and r0, and the last token
of a completion predicts nothing: it is a target only and never enters the model. A conversation is one completion, of
which only some tokens are predicted.

The padded layout is one right-padded row per completion with its prompt repeated, for the architectures that
cannot share a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from qlora_dpo.data.conversation_tokens import TokenizedConversation

LayoutKind = Literal["shared", "padded"]


class Pair(Protocol):
    """Token ids of a preference pair; completions are not empty, neither is the prompt."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def chosen_ids(self) -> Sequence[int]: ...
    @property
    def rejected_ids(self) -> Sequence[int]: ...


Sample = Pair | TokenizedConversation


@dataclass(frozen=True)
class Completion:
    """Token ids that continue a prompt, and the places among them that are predicted."""

    ids: Sequence[int]
    targets: Sequence[int]


def prompt_and_completions(sample: Sample) -> tuple[Sequence[int], tuple[Completion, ...]]:
    """The prompt of a sample and what continues it: two whole completions, or the rest of a conversation."""
    if isinstance(sample, TokenizedConversation):
        prompt = sample.prompt_ids
        targets = [place - len(prompt) for span in sample.spans for place in range(*span)]
        return prompt, (Completion(sample.ids[len(prompt) :], targets),)
    both = (sample.chosen_ids, sample.rejected_ids)
    return sample.prompt_ids, tuple(Completion(ids, range(len(ids))) for ids in both)


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
    """One micro-batch of B samples, ready for the model.

    `input_ids`, `position_ids` [rows, T]. `predictor_index` [N] points into the flattened rows at the token that
    predicts `target_ids` [N]; the N predicted tokens are ordered chosen_0, rejected_0, chosen_1, ... and
    `completion_lengths` counts them, [2B] of pairs and [B] of conversations. `layout` is None in the padded form, which
    has an `attention_mask`.
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


def token_cost(sample: Sample, kind: LayoutKind) -> int:
    """Tokens that a sample puts through the model: a pair's prompt once (shared) or twice (padded)."""
    if isinstance(sample, TokenizedConversation):
        return len(sample.ids) - 1
    prompt, chosen, rejected = len(sample.prompt_ids), len(sample.chosen_ids) - 1, len(sample.rejected_ids) - 1
    if kind == "shared":
        return prompt + chosen + rejected
    return 2 * (prompt + max(chosen, rejected))


def target_count(sample: Sample) -> int:
    """Tokens of the chosen completion, or supervised tokens of a conversation."""
    if isinstance(sample, TokenizedConversation):
        return sum(end - start for start, end in sample.spans)
    return len(sample.chosen_ids)


def batch_cost(samples: Sequence[Sample], kind: LayoutKind) -> int:
    """Tokens that a micro-batch of these samples puts through the model, padding included."""
    costs = [token_cost(sample, kind) for sample in samples]
    return sum(costs) if kind == "shared" else len(costs) * max(costs)


def cut(samples: Sequence[Sample], max_tokens: int, kind: LayoutKind, group: int = 1) -> list[list[int]]:
    """Cut a step's samples into micro-batches of at most `max_tokens`, as lists of indices into `samples`.

    First-fit decreasing fills the budgets; a sample above the budget gets a micro-batch of its own. With `group` > 1
    each run of that many consecutive pairs stays together, for losses that couple the pairs of a group.
    """
    groups = [list(range(start, min(start + group, len(samples)))) for start in range(0, len(samples), group)]
    groups.sort(key=lambda members: -batch_cost([samples[i] for i in members], kind))
    bins: list[list[int]] = []
    for members in groups:
        for candidate in bins:
            if batch_cost([samples[i] for i in candidate + members], kind) <= max_tokens:
                candidate += members
                break
        else:
            bins.append(list(members))
    return [sorted(members) for members in bins]


def pack(samples: Sequence[Sample], kind: LayoutKind) -> PackedBatch:
    """Lay the samples out for one forward pass."""
    return _pack_shared(samples) if kind == "shared" else _pack_padded(samples)


def _pack_shared(samples: Sequence[Sample]) -> PackedBatch:
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    lengths: list[int] = []
    segments: list[Segment] = []
    for sample in samples:
        start = len(ids)
        prompt_ids, completions = prompt_and_completions(sample)
        prompt = len(prompt_ids)
        ids += prompt_ids
        positions += range(prompt)
        for number, completion in enumerate(completions):
            own, length = len(ids), len(completion.ids) - 1
            ids += completion.ids[:-1]
            positions += range(prompt, prompt + length)
            predictors += [own + place - 1 if place else start + prompt - 1 for place in completion.targets]
            targets += [completion.ids[place] for place in completion.targets]
            lengths.append(len(completion.targets))
            if number == 0:
                segments.append(Segment(start, prompt + length))
            elif length:
                segments.append(Segment(own, length, start, prompt))
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


def _pack_padded(samples: Sequence[Sample]) -> PackedBatch:
    parts = [prompt_and_completions(sample) for sample in samples]
    both = [(prompt_ids, completion) for prompt_ids, completions in parts for completion in completions]
    rows = [[*prompt_ids, *completion.ids[:-1]] for prompt_ids, completion in both]
    width = max(len(row) for row in rows)
    predictors: list[int] = []
    for number, (prompt_ids, completion) in enumerate(both):
        first = number * width + len(prompt_ids) - 1
        predictors += [first + place for place in completion.targets]
    return PackedBatch(
        input_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        position_ids=torch.arange(width).expand(len(rows), width),
        predictor_index=torch.tensor(predictors),
        target_ids=torch.tensor([completion.ids[place] for _, completion in both for place in completion.targets]),
        completion_lengths=tuple(len(completion.targets) for _, completion in both),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    )
