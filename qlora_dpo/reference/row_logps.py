"""Log-probs that data rows bring along (`reference_chosen_log_prob`): sums, checked on a sample before use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_dpo.data.packing import PackedBatch
from qlora_dpo.errors import ModelError
from qlora_dpo.reference.drift import Drift, drift_of_sums, refuse_drift
from qlora_dpo.reference.local import Reference
from qlora_dpo.reference.store import Logps

Sums = NDArray[np.float64]
"""Log-probs of whole answers, [pairs, 2]: chosen and rejected; NaN where a row brings none."""

FEW = 4  # whole numbers that may be chance

# What the numbers of a row may be instead, and how that is made of the log-probs of both answers.
_INSTEAD: tuple[tuple[str, Callable[[Logps, Logps], tuple[float, float]]], ...] = (
    ("sums without the token that ends the answer", lambda chosen, rejected: (chosen[:-1].sum(), rejected[:-1].sum())),
    ("means per token instead of sums", lambda chosen, rejected: (chosen.mean(), rejected.mean())),
    ("those of the other answer", lambda chosen, rejected: (rejected.sum(), chosen.sum())),
)
_ADVICE = "Leave them unused with --row_reference ignore: the reference is then computed here."


class RowReference:
    """A reference whose sums the rows bring along, spread evenly over their tokens; other pairs are scored."""

    def __init__(self, sums: Sums, scored: Reference) -> None:
        self._sums, self._scored = sums, scored

    def __call__(self, keys: Sequence[int], batch: PackedBatch) -> Tensor:
        """Log-probs [N] of the batch, whose pairs are named by `keys` [B]."""
        lengths = batch.completion_lengths
        sums = self._sums[list(keys)].ravel()
        if np.isnan(sums).any():
            values = list(torch.split(self._scored(keys, batch).cpu(), list(lengths)))
        else:
            values = [torch.empty(0)] * len(lengths)
        for place, total in enumerate(sums):
            if not np.isnan(total):
                values[place] = torch.from_numpy(spread(float(total), lengths[place]))
        return torch.cat(values).to(batch.target_ids.device, non_blocking=True)

    def unknown(self, keys: Sequence[int]) -> list[int]:
        """Those of the pairs that have not been scored yet, and need to be."""
        return self._scored.unknown([key for key in keys if np.isnan(self._sums[key]).any()])

    def forget(self, keys: Sequence[int]) -> None:
        """Score these pairs anew when they come again."""
        self._scored.forget(keys)

    def blank(self) -> Reference:
        """The same reference, computed here, with nothing scored yet."""
        return self._scored.blank()


def spread(total: float, length: int) -> Logps:
    """A log-prob for each of `length` tokens, whose sum is `total`."""
    values = np.full(length, total / length, np.float32)
    values[-1] += total - values.sum(dtype=np.float64)
    return values


def check_row_sums(sums: Sums, ours: Sequence[Logps], *, beta: float, max_drift: float) -> Drift:
    """Compare the sums [B, 2] of some rows with the log-probs of their answers, chosen_0, rejected_0, chosen_1, ...

    Raises:
        ModelError: they are not this model's, with what they may be instead.
    """
    drift = drift_of_sums(sums.ravel().tolist(), ours, beta)
    what = "the log-probs that the rows bring along"
    if sums.size >= FEW and np.array_equal(sums, np.round(sums)):
        raise ModelError(
            f"{what} are whole numbers: they were cast to integers, as OpenDPO casts them to int32, or summed in 16 "
            f"bits. Each is off by up to 1 nat. {drift} {_ADVICE}"
        )
    refuse_drift(drift, max_drift, what, f"{_instead(sums, ours, drift)}{_ADVICE}")
    return drift


def _instead(sums: Sums, ours: Sequence[Logps], drift: Drift) -> str:
    """What the numbers fit much better, as a sentence."""
    for name, make in _INSTEAD:
        other = [make(chosen, rejected) for chosen, rejected in zip(ours[::2], ours[1::2], strict=True)]
        if np.abs(np.array(other) - sums).mean() < drift.mean_per_answer / 4:
            return f"They seem to be {name}. "
    return ""
