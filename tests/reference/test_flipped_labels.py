"""The estimated share of flipped labels, on margins whose flips are known; and when it is not told."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from qlora_dpo.reference.flipped_labels import FEWEST, estimate_flipped


def margins(count: int, mean: float, deviation: float, flipped: float, seed: int = 0) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    signs = np.where(generator.random(count) < flipped, -1, 1)
    return signs * generator.normal(mean, deviation, count)


@pytest.mark.parametrize("separation", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("flipped", [0.0, 0.02, 0.1, 0.25, 0.4])
def test_known_flips_are_found(flipped: float, separation: float) -> None:
    found = estimate_flipped(margins(3000, 0.7 * separation, 0.7, flipped, seed=1))
    assert found.why_unknown is None and found.share == pytest.approx(flipped, abs=0.025)
    assert found.separation == pytest.approx(separation, rel=0.06)
    assert found.low is not None and found.high is not None and found.low <= found.share <= found.high


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    found = [estimate_flipped(margins(400, 2, 1, 0.15, seed)) for seed in range(40)]
    holds = sum(one.low <= 0.15 <= one.high for one in found if one.low is not None and one.high is not None)
    assert 34 <= holds <= 40
    widths = [one.high - one.low for one in found if one.low is not None and one.high is not None]
    assert 0.05 < np.mean(widths) < 0.1


def test_scale_does_not_matter_and_large_sets_are_as_exact() -> None:
    small = margins(5000, 2, 1, 0.2)
    one, other = estimate_flipped(small), estimate_flipped(1000 * small)
    assert one.share == pytest.approx(other.share or 0, abs=1e-6)
    assert estimate_flipped(margins(200_000, 2, 1, 0.2)).share == pytest.approx(0.2, abs=0.004)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (margins(FEWEST - 1, 3, 1, 0.1), f"there are {FEWEST - 1} pairs, and it takes {FEWEST}"),
        (margins(2000, 0.4, 1, 0.1), "right and flipped labels look the same"),
        (np.zeros(500), "all margins are the same"),
        (-margins(1000, 3, 1, 0.1), "disagrees with about half of the labels or more (9"),
        (margins(1000, 3, 1, 0.5), "disagrees with about half of the labels or more"),
        (np.concatenate([margins(300, 1, 0.1, 0), margins(300, 30, 0.1, 0)]), "not spread like two mirrored normal"),
        (margins(100, 1.2, 1, 0.4, seed=3), "estimates from resampled pairs lie between"),
    ],
)
def test_what_cannot_be_told_is_not_told(values: NDArray[np.float64], reason: str) -> None:
    found = estimate_flipped(values)
    assert found.why_unknown is not None and reason in found.why_unknown
    assert str(found).startswith("The share of flipped labels cannot be told: ")


def test_sentence_has_the_option_unless_there_is_nothing_to_smooth() -> None:
    said = str(estimate_flipped(margins(2000, 3, 1, 0.12)))
    assert (
        said.startswith("About 1") and "--loss_type robust --label_smoothing 0.1" in said and "3.0 deviations" in said
    )
    clean = str(estimate_flipped(margins(2000, 3, 1, 0)))
    assert clean.startswith("About 0.0% of the labels are flipped") and "label_smoothing" not in clean
