"""How far log-probs that come from elsewhere lie from those of the trainer's own base, and what that does to the loss.

With log-probs of another model as the reference, the untrained policy is no longer the reference: at step 1 the margins
are not 0 and the loss is not exactly ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.errors import ModelError

Logps = Sequence[NDArray[np.floating]]


@dataclass(frozen=True)
class Drift:
    """Differences between two models on the same completions, absolute ones; per answer they are of its sum."""

    pairs: int
    tokens: int
    mean_per_token: float
    max_per_token: float
    mean_per_answer: float
    max_per_answer: float
    mean_margin: float
    """|beta * (difference of chosen - difference of rejected)|: the margin at step 1, where it should be 0."""
    loss: float
    """The sigmoid loss at step 1, where it should be ln 2."""
    beta: float

    def __str__(self) -> str:
        return (
            f"{self.pairs:,} pairs with {self.tokens:,} tokens recomputed here: they differ by "
            f"{self.mean_per_token:.4f} per token on average (at most {self.max_per_token:.3g}), by "
            f"{self.mean_per_answer:.3g} per answer (at most {self.max_per_answer:.3g}). As the reference they begin "
            f"the training with margins of {self.mean_margin:.3g} instead of 0 and a sigmoid loss of {self.loss:.4f} "
            f"instead of {math.log(2):.4f} (beta {self.beta:g})."
        )

    @property
    def largest_reward(self) -> float:
        """The largest implicit reward that the difference alone gives an answer."""
        return self.beta * self.max_per_answer


def drift_between(theirs: Logps, ours: Logps, beta: float) -> Drift:
    """Compare the per-token log-probs of completions in the order chosen_0, rejected_0, chosen_1, ..."""
    differences = [a.astype(np.float64) - b.astype(np.float64) for a, b in zip(theirs, ours, strict=True)]
    per_token = np.abs(np.concatenate(differences))
    per_answer = np.array([difference.sum() for difference in differences])
    margins = beta * (per_answer[1::2] - per_answer[0::2])  # of the policy, which is ours, against the reference
    return Drift(
        pairs=len(margins),
        tokens=len(per_token),
        mean_per_token=float(per_token.mean()),
        max_per_token=float(per_token.max()),
        mean_per_answer=float(np.abs(per_answer).mean()),
        max_per_answer=float(np.abs(per_answer).max()),
        mean_margin=float(np.abs(margins).mean()),
        loss=float(np.logaddexp(0, -margins).mean()),
        beta=beta,
    )


def drift_of_sums(sums: Sequence[float], ours: Logps, beta: float) -> Drift:
    """The same where of the others only the sum over each completion is known: its difference, spread evenly."""
    theirs = [own + (total - own.sum(dtype=np.float64)) / len(own) for total, own in zip(sums, ours, strict=True)]
    return drift_between(theirs, ours, beta)


def refuse_drift(drift: Drift, max_drift: float, what: str, advice: str) -> None:
    """Refuse log-probs that are too far away.

    Raises:
        ModelError: with the numbers.
    """
    if drift.mean_per_token <= max_drift:
        return
    raise ModelError(
        f"{what} are those of another model: {drift} That is above --max_drift {max_drift:g} per token. {advice}"
    )
