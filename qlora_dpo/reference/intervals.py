"""How sure a share is: Wilson's score interval."""

from __future__ import annotations

import math
from statistics import NormalDist

Z = NormalDist().inv_cdf(0.975)  # of 95 % intervals

Interval = tuple[float, float]


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's score interval (1927) of a proportion, 95 %; half a success is a tie.

    Raises:
        ValueError: there are no trials.
    """
    if trials < 1:
        raise ValueError("no interval of nothing")
    share, weight = successes / trials, Z * Z / trials
    center = (share + weight / 2) / (1 + weight)
    half = Z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(0.0, center - half), min(1.0, center + half)
