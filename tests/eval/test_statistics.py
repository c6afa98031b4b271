"""Each number against one that was computed by hand, by another formula, or by what was put into made data."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eval.statistics import bootstrap_mean, firth_logistic, length_controlled
from qlora_dpo.reference.intervals import wilson


def logit(share: float) -> float:
    return math.log(share / (1 - share))


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # statsmodels.stats.proportion.proportion_confint(method="wilson")
        (8, 10, 0.4901625, 0.9433178),
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (50, 100, 0.4038315, 0.5961685),
        (1, 1, 0.2065493, 1.0),
    ],
)
def test_wilson_is_that_of_statsmodels(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(7, 23), (40.5, 60), (3, 300)])
def test_borders_of_wilson_are_where_the_score_test_rejects(successes: float, trials: int) -> None:
    share = successes / trials
    for border in wilson(successes, trials):
        assert abs(share - border) == pytest.approx(1.959964 * math.sqrt(border * (1 - border) / trials), rel=1e-5)


def test_nothing_has_no_interval() -> None:
    for function in (lambda: wilson(0, 0), lambda: bootstrap_mean([])):
        with pytest.raises(ValueError, match="nothing"):
            function()


def test_bootstrap_of_two_values_takes_the_three_means_that_there_are() -> None:
    # 0, 1/2 and 1, with 1/4, 1/2 and 1/4 of the resamples: the borders are the extremes.
    assert bootstrap_mean([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_mean([0.3, 0.3, 0.3]) == pytest.approx((0.3, 0.3))


def test_bootstrap_comes_to_the_normal_interval_and_repeats_with_its_seed() -> None:
    values = np.random.default_rng(3).normal(0.4, 2.0, 900)
    error = values.std() / math.sqrt(900)
    found = bootstrap_mean(values)
    assert found == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.06 * error)
    assert found == bootstrap_mean(values) != bootstrap_mean(values, seed=1)
    assert bootstrap_mean(np.tile(values, 20), resamples=500)[0] > found[0]  # more data, in several parts


def test_firth_of_a_share_adds_half_a_success_and_half_a_failure() -> None:
    for wins, count in ((0, 7), (5, 7), (7, 7)):
        won = np.array([1.0] * wins + [0.0] * (count - wins))
        weights, errors = firth_logistic(np.ones((count, 1)), won)
        share = (wins + 0.5) / (count + 1)
        assert weights[0] == pytest.approx(logit(share), abs=1e-7)
        assert errors[0] == pytest.approx(1 / math.sqrt(count * share * (1 - share)), rel=1e-6)


@pytest.mark.parametrize("table", [((3, 10), (9, 12)), ((0, 5), (6, 6)), ((4, 4), (1, 9))])
def test_firth_of_a_table_adds_half_to_each_of_its_cells(table: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Jeffreys' prior of a saturated model; also where plain logistic regression has no solution."""
    (low_wins, low), (high_wins, high) = table
    design = np.array([[1.0, 0.0]] * low + [[1.0, 1.0]] * high)
    won = np.array([1.0] * low_wins + [0.0] * (low - low_wins) + [1.0] * high_wins + [0.0] * (high - high_wins))
    weights, _ = firth_logistic(design, won)
    first = logit((low_wins + 0.5) / (low + 1))
    second = logit((high_wins + 0.5) / (high + 1))
    assert weights == pytest.approx([first, second - first], abs=1e-7)


def test_wins_by_length_alone_are_no_wins_at_equal_length() -> None:
    random = np.random.default_rng(0)
    longer = random.normal(30, 40, 4000)  # mostly longer
    shares = 1 / (1 + np.exp(-2.0 * np.tanh(longer / longer.std())))
    won = (random.random(4000) < shares).astype(float)
    found = length_controlled(won, longer)
    assert won.mean() > 0.65
    assert found.win_rate == pytest.approx(0.5, abs=0.04)
    assert found.interval is not None and found.interval[0] < 0.5 < found.interval[1]


def test_wins_that_have_nothing_to_do_with_length_stay() -> None:
    random = np.random.default_rng(1)
    longer = random.normal(30, 40, 4000)
    won = (random.random(4000) < 0.7).astype(float)
    found = length_controlled(won, longer)
    assert found.win_rate == pytest.approx(0.7, abs=0.03)
    assert found.interval is not None and found.interval[0] < 0.7 < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.06


def test_the_interval_at_equal_length_holds_the_truth_nineteen_times_of_twenty() -> None:
    random, held = np.random.default_rng(2), 0
    for _ in range(200):
        longer = random.normal(10, 20, 150)
        shares = 1 / (1 + np.exp(-(0.8 + 1.2 * np.tanh(longer / longer.std()))))
        found = length_controlled((random.random(150) < shares).astype(float), longer)
        assert found.interval is not None
        held += found.interval[0] <= 1 / (1 + math.exp(-0.8)) <= found.interval[1]
    assert 180 <= held <= 199


def test_mirrored_verdicts_mirror_the_rate() -> None:
    random = np.random.default_rng(4)
    longer, won = random.integers(-9, 15, 60), random.choice([0.0, 0.5, 1.0], 60)
    one, other = length_controlled(won, longer), length_controlled(1 - won, -longer)
    assert one.win_rate is not None and other.win_rate is not None
    assert one.win_rate + other.win_rate == pytest.approx(1)


def test_what_the_lengths_cannot_tell_is_not_told() -> None:
    assert "longer" in str(length_controlled([1, 0, 1], [5, 5, 5]).why_unknown)
    assert "shorter" in str(length_controlled([1, 0, 1], [-5, -1, -7]).why_unknown)
    assert length_controlled([], []).win_rate is None
    equal = length_controlled([1, 1, 0, 0.5], [0, 0, 0, 0])
    assert equal.win_rate == 0.625 and equal.interval == wilson(2.5, 4)
