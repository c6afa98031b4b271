"""How sure a comparison is: intervals of win rates and score differences, and win rates at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qlora_dpo.reference.intervals import Interval, Z, wilson

_RESAMPLES = 10_000
_AT_ONCE = 2_000_000  # drawn places in memory
_STEPS = 100  # of Newton's method, which needs about ten


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, resamples: int = _RESAMPLES) -> Interval:
    """Percentile interval, 95 %, of the mean of paired differences; prompts are resampled, the same seed the same way.

    Raises:
        ValueError: there are no values.
    """
    found = np.asarray(values, np.float64)
    if found.size == 0:
        raise ValueError("no interval of nothing")
    random = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // found.size)
    means = np.concatenate(
        [
            found[random.integers(found.size, size=(min(at_once, resamples - start), found.size))].mean(1)
            for start in range(0, resamples, at_once)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975)).tolist()
    return low, high


@dataclass(frozen=True)
class LengthControlled:
    """The win rate that answers of equal length would have; None where the data cannot tell it."""

    win_rate: float | None
    interval: Interval | None
    why_unknown: str | None = None


def length_controlled(wins: ArrayLike, length_differences: ArrayLike) -> LengthControlled:
    """The length-controlled win rate (arXiv 2404.04475): logit P(win) = a + b * tanh(difference / deviation), at a
    difference of 0.

    A tie is half a win. The fit maximizes the likelihood with Firth's penalty (1993), which stays finite where the
    lengths tell all wins from all defeats. Where no difference or only those of one sign were seen, the model would
    have to be believed beyond the data: then it is not known.
    """
    won, longer = np.asarray(wins, np.float64), np.asarray(length_differences, np.float64)
    if won.size == 0:
        return LengthControlled(None, None, "there are no verdicts")
    deviation = float(longer.std())
    if not longer.any():
        return LengthControlled(float(won.mean()), wilson(float(won.sum()), won.size))
    if not longer.min() <= 0 <= longer.max():
        which = "longer" if longer.min() > 0 else "shorter"
        return LengthControlled(None, None, f"every answer after is {which} than the one before")
    design = np.stack([np.ones_like(won), np.tanh(longer / deviation)], axis=1)
    weights, errors = firth_logistic(design, won)
    low, high = weights[0] - Z * errors[0], weights[0] + Z * errors[0]
    return LengthControlled(_logistic(weights[0]), (_logistic(low), _logistic(high)))


def firth_logistic(
    design: NDArray[np.float64], successes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights [K] of a logistic regression with Firth's penalty, and their standard errors [K].

    `design` is [N, K]; `successes` [N] lie between 0 and 1.
    """
    weights = np.zeros(design.shape[1])
    value = _penalized(design, successes, weights)
    for _ in range(_STEPS):
        shares = 1 / (1 + np.exp(-design @ weights))
        spread = shares * (1 - shares)
        covariance = np.linalg.inv((design * spread[:, None]).T @ design)
        leverage = spread * np.einsum("nk,kl,nl->n", design, covariance, design)
        step = covariance @ (design.T @ (successes - shares + leverage * (0.5 - shares)))
        found = _penalized(design, successes, weights + step)
        while found < value and np.abs(step).max() > 1e-12:  # a step too far
            step /= 2
            found = _penalized(design, successes, weights + step)
        weights, value = weights + step, found
        if np.abs(step).max() < 1e-9:
            break
    return weights, np.sqrt(np.diag(covariance))


def _penalized(design: NDArray[np.float64], successes: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Log-likelihood plus half the logarithm of the information's determinant."""
    logits = design @ weights
    likelihood = float((successes * logits - np.logaddexp(0, logits)).sum())
    shares = 1 / (1 + np.exp(-logits))
    _, determinant = np.linalg.slogdet((design * (shares * (1 - shares))[:, None]).T @ design)
    return likelihood + 0.5 * float(determinant)


def _logistic(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return float(np.mean(values)) if values else 0.0
