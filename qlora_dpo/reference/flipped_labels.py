"""Estimates the share of flipped labels in a data set from the margins of its pairs.

The margins are taken for a mixture of two normal distributions that mirror each other: pairs that are labelled right
have margins around mu, flipped ones around -mu, with one deviation sigma,

    p(m) = (1 - epsilon) N(m; mu, sigma^2) + epsilon N(m; -mu, sigma^2)

fitted by expectation maximization (Dempster, Laird and Rubin 1977). At its fixed points mu^2 + sigma^2 is the mean
square of the margins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]

FEWEST = 100  # pairs
LEAST_SEPARATION = 1.0  # mu / sigma: below, even two equal halves have one common peak
MOST_DISTANCE = 0.1  # between the distribution functions of margins and mixture (Kolmogorov and Smirnov's)
WIDEST = 0.3  # interval that still says something
WORTH_SMOOTHING = 0.01  # share from which on the loss is told of it
MOST = 0.45  # share of flipped labels: at a half, right and flipped are one

_GROUPS = 512  # of margins that are close to each other, so that the time does not grow with the rows
_RESAMPLED = 200
_STEPS, _CLOSE = 1000, 1e-6  # of expectation maximization: at most so many, until no share moves by more
_TINY = 1e-12
_DIGITS = 4


@dataclass(frozen=True)
class FlippedLabels:
    """An estimated share of flipped labels; what could not be computed is None."""

    share: float | None = None
    low: float | None = None
    high: float | None = None
    """From `low` to `high` 95 % of the estimates from resampled pairs; `high` is at least 3 / pairs."""
    separation: float | None = None
    """mu / sigma: how many deviations the margins of rightly labelled pairs lie above 0."""
    why_unknown: str | None = None
    """Why the share is not to be believed; None where it is."""

    def __str__(self) -> str:
        if self.why_unknown is not None:
            return f"The share of flipped labels cannot be told: {self.why_unknown}."
        assert self.share is not None and self.low is not None and self.high is not None
        advice = f" For training on these pairs: --loss_type robust --label_smoothing {self.share:.2f}."
        return (
            f"About {self.share:.1%} of the labels are flipped (95 % of resampled estimates: {self.low:.1%} to "
            f"{self.high:.1%}; the margins lie {self.separation:.1f} deviations from 0)."
            + (advice if self.share >= WORTH_SMOOTHING else "")
        )


def estimate_flipped(margins: Numbers, seed: int = 0) -> FlippedLabels:
    """The share of flipped labels among the pairs with these margins, with a bootstrap interval."""
    if len(margins) < FEWEST:
        return FlippedLabels(why_unknown=f"there are {len(margins):,} pairs, and it takes {FEWEST}")
    if np.ptp(margins) == 0:
        return FlippedLabels(why_unknown="all margins are the same")
    groups = np.array_split(np.sort(margins), min(_GROUPS, len(margins)))
    values = np.array([group.mean() for group in groups])
    weights = np.array([len(group) for group in groups]) / len(margins)
    share, mean, deviation = (float(fitted[0]) for fitted in _fit(values, weights[None]))
    drawn = np.random.default_rng(seed).multinomial(len(margins), weights, size=_RESAMPLED) / len(margins)
    low, high = np.quantile(_fit(values, drawn)[0], [0.025, 0.975]).tolist()
    high = max(high, 3 / len(margins))  # what is not seen among n may still have a share of 3 / n
    separation = mean / deviation
    reason = _why_unknown(share, low, high, separation, _distance(values, weights, share, mean, deviation))
    share, low, high, separation = (round(number, _DIGITS) for number in (share, low, high, separation))
    return FlippedLabels(share, low, high, separation, reason)


def _why_unknown(share: float, low: float, high: float, separation: float, distance: float) -> str | None:
    reasons = (
        (
            separation < LEAST_SEPARATION,
            f"the margins lie {separation:.2f} deviations from 0, and below {LEAST_SEPARATION:g} right and flipped "
            "labels look the same",
        ),
        (
            share > MOST,
            f"the adapter disagrees with about half of the labels or more ({share:.0%}), so it may be the one that is "
            "wrong",
        ),
        (
            distance > MOST_DISTANCE,
            f"the margins are not spread like two mirrored normal distributions (distance {distance:.2f}, at most "
            f"{MOST_DISTANCE:g})",
        ),
        (high - low > WIDEST, f"estimates from resampled pairs lie between {low:.0%} and {high:.0%}"),
    )
    return next((reason for holds, reason in reasons if holds), None)


def _fit(values: Numbers, weights: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Share of flipped labels, mu and sigma [B] of the mixtures that fit `values` [K] with the weights [B, K] best."""
    square = weights @ values**2
    mean = weights @ np.abs(values)
    share = weights @ (values < 0)
    for _ in range(_STEPS):
        variance = np.maximum(square - mean**2, _TINY * square)
        share = np.clip(share, _TINY, 1 - _TINY)
        odds = np.log(share / (1 - share))[:, None] - (2 * mean / variance)[:, None] * values
        is_flipped = 0.5 + 0.5 * np.tanh(0.5 * odds)  # the logistic function, without overflow
        before, share = share, (weights * is_flipped).sum(1)
        mean = (weights * (1 - 2 * is_flipped)) @ values
        if np.abs(share - before).max() < _CLOSE:
            break
    # The same mixture has two names; this is the one with mu > 0.
    share = np.where(mean < 0, 1 - share, share)
    return share, np.abs(mean), np.sqrt(np.maximum(square - mean**2, _TINY * square))


def _distance(values: Numbers, weights: Numbers, share: float, mean: float, deviation: float) -> float:
    """The largest difference between the distribution functions of the margins and of the mixture."""
    of_margins = np.cumsum(weights) - weights / 2
    correct, flipped = _normal_cdf((values - mean) / deviation), _normal_cdf((values + mean) / deviation)
    return float(np.abs(of_margins - (1 - share) * correct - share * flipped).max())


def _normal_cdf(z: Numbers) -> Numbers:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in z])
