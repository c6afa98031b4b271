"""Log-probs of the frozen reference, computed with the policy's own layout and kernels, once per pair and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_dpo.data.packing import LayoutKind, PackedBatch, Pair, cut, pack
from qlora_dpo.models.lora import reference_active
from qlora_dpo.models.scoring import Scorer
from qlora_dpo.reference.store import Logps

Score = Callable[[PackedBatch], Tensor]
"""Runs the reference on a batch; gives the log-probs [N] of its completion tokens."""


class Reference(Protocol):
    """Per-token reference log-probs by pair; a pair that was scored before costs nothing."""

    def __call__(self, keys: Sequence[int], batch: PackedBatch) -> Tensor:
        """Log-probs [N] of the batch, whose pairs are named by `keys` [B]."""

    def unknown(self, keys: Sequence[int]) -> list[int]:
        """Those of the pairs that have not been scored yet."""

    def forget(self, keys: Sequence[int]) -> None:
        """Score these pairs anew when they come again."""

    def blank(self) -> Reference:
        """The same reference, computed here, with nothing scored yet."""


class ReferenceLogps:
    """The reference of one run, whose log-probs are held in memory."""

    def __init__(self, score: Score, known: Mapping[int, Tensor] | None = None) -> None:
        """`known` are log-probs that were computed before, of both completions of a pair in one row."""
        self._score = score
        self._known = dict(known or {})

    def __call__(self, keys: Sequence[int], batch: PackedBatch) -> Tensor:
        """Log-probs [N] of the batch, whose pairs are named by `keys` [B]."""
        if any(key not in self._known for key in keys):
            per_token = self._score(batch).float().cpu()
            lengths = batch.completion_lengths
            per_pair = [chosen + rejected for chosen, rejected in zip(lengths[::2], lengths[1::2], strict=True)]
            for key, values in zip(keys, torch.split(per_token, per_pair), strict=True):
                self._known.setdefault(key, values)
        known = torch.cat([self._known[key] for key in keys])
        return known.to(batch.target_ids.device, non_blocking=True)

    def unknown(self, keys: Sequence[int]) -> list[int]:
        """Those of the pairs that have not been scored yet."""
        return [key for key in keys if key not in self._known]

    def forget(self, keys: Sequence[int]) -> None:
        """Score these pairs anew when they come again."""
        for key in keys:
            self._known.pop(key, None)

    def blank(self) -> ReferenceLogps:
        """The same reference with nothing scored yet."""
        return ReferenceLogps(self._score)


class NoReference:
    """Of an objective that has no reference: log-probs of 0, so that its rewards are the policy's alone."""

    def __call__(self, keys: Sequence[int], batch: PackedBatch) -> Tensor:
        """Zeros [N]."""
        return torch.zeros(sum(batch.completion_lengths), device=batch.target_ids.device)

    def unknown(self, keys: Sequence[int]) -> list[int]:
        """There is nothing to score."""
        return []

    def forget(self, keys: Sequence[int]) -> None:
        """There is nothing to forget."""

    def blank(self) -> NoReference:
        """Itself."""
        return self


def reference_score(model: Any, scorer: Scorer) -> Score:
    """Scores with the reference that lives in the policy's own base."""

    def score(batch: PackedBatch) -> Tensor:
        with torch.no_grad(), reference_active(model):
            return scorer.per_token_logps(model, batch)

    return score


def local_reference(model: Any, scorer: Scorer) -> ReferenceLogps:
    """The reference that lives in the policy's own base, held in memory."""
    return ReferenceLogps(reference_score(model, scorer))


def logps_by_completion(
    score: Score, pairs: Sequence[Pair], *, kind: LayoutKind, device: torch.device, max_tokens: int
) -> list[Logps]:
    """The log-probs of both completions of each pair, in the order chosen_0, rejected_0, chosen_1, ..."""
    found: dict[int, Logps] = {}
    for members in cut(pairs, max_tokens, kind):
        batch = pack([pairs[member] for member in members], kind).to(device)
        parts = split_by_completion(score(batch), batch)
        for place, member in enumerate(members):
            found[2 * member], found[2 * member + 1] = parts[2 * place], parts[2 * place + 1]
    return [found[place] for place in range(2 * len(pairs))]


def split_by_completion(per_token: Tensor, batch: PackedBatch) -> list[Logps]:
    """The values [N] of a batch's tokens, completion by completion, each in memory of its own."""
    values: Logps = per_token.float().cpu().numpy()
    parts, start = [], 0
    for length in batch.completion_lengths:
        parts.append(values[start : start + length].copy())
        start += length
    return parts
