"""Log-probs of the frozen reference, computed with the policy's own layout and kernels, once per pair and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qlora_dpo.data.packing import PackedBatch


class ReferenceLogps:
    """Per-token reference log-probs by pair; a pair that was scored before costs nothing.

    `score` runs the reference on a batch and returns the log-probs [N] of its completion tokens.
    """

    def __init__(self, score: Callable[[PackedBatch], Tensor]) -> None:
        self._score = score
        self._known: dict[int, Tensor] = {}

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
