"""Downsampling hides nothing: extremes stay, means are means, gaps are gaps."""

from __future__ import annotations

import math
import random

import pytest

from eval.report.series import GROUPS, MOST_POINTS, derived, scaled, series
from eval.report.svg import Chart, Line, draw, is_logarithmic, short


def rows(values: list[float], key: str = "loss") -> list[dict[str, float]]:
    return [{"step": step, key: value} for step, value in enumerate(values, 1)]


def test_short_run_is_drawn_as_it_is() -> None:
    found = series(rows([float(n) for n in range(MOST_POINTS)]), "loss")
    assert found is not None and not found.is_grouped
    assert [point.mean for point in found.points] == [float(n) for n in range(MOST_POINTS)]


def test_groups_keep_every_extreme_and_the_mean() -> None:
    chance = random.Random(1)
    values = [chance.gauss(0, 1) for _ in range(10_000)]
    values[4321], values[9999] = 50.0, -60.0
    found = series(rows(values), "loss")
    assert found is not None and found.is_grouped and len(found.points) == GROUPS
    assert max(point.high for point in found.points) == 50.0
    assert min(point.low for point in found.points) == -60.0
    for point in found.points:
        members = values[point.first - 1 : point.last]
        assert (point.low, point.high) == (min(members), max(members))
        assert point.mean == pytest.approx(sum(members) / len(members))
    assert [point.first for point in found.points[1:]] == [point.last + 1 for point in found.points[:-1]]
    assert (found.points[0].first, found.points[-1].last) == (1, 10_000)


def test_what_is_not_finite_is_counted_and_not_averaged() -> None:
    values = [1.0] * 5000
    values[100] = math.nan
    values[2000:2100] = [math.inf] * 100
    found = series(rows(values), "loss")
    assert found is not None and found.bad_steps == (101, *range(2001, 2101))
    assert {point.mean for point in found.points} == {1.0, None}
    svg = draw(Chart("Loss", (Line(found, "training", 1),)))
    assert "nan" not in svg and "inf" not in svg
    assert svg.count('class="bad"') >= 2


def test_what_was_never_logged_is_no_series() -> None:
    assert series(rows([1.0]), "other") is None
    assert derived(rows([1.0]), "loss", "other", "x") is None
    assert scaled(None, 2.0, "x") is None


def test_scaling_turns_the_extremes_around() -> None:
    found = scaled(series(rows([1.0] * 150 + [2.0, 4.0] * 100), "loss"), -10.0, "x")
    assert found is not None
    assert min(point.low for point in found.points) == -40.0
    assert all(point.low <= (point.mean or 0) <= point.high for point in found.points)


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0] * 3, [1e-300, 1e300], [-1e308, 1e308], [1e-12, 2e-12], [math.nan, 1.0], [1e308] * 500, [0.0, 1e-320]],
)
def test_any_numbers_can_be_drawn(values: list[float]) -> None:
    for is_log in (False, True):
        found = series(rows(values), "loss")
        assert found is not None
        svg = draw(Chart("Loss", (Line(found, "training", 1),), (0.5, "half"), (0.0, None), is_log))
        assert "nan" not in svg and "inf" not in svg and svg.count("<text") < 40


def test_large_ratios_get_a_log_axis() -> None:
    spiky = series(rows([1.0] * 50 + [500.0]), "loss")
    flat = series(rows([1.0] * 50 + [3.0]), "loss")
    assert spiky is not None and flat is not None
    assert is_logarithmic(Chart("x", (Line(spiky, "x", 1),), bounds=(0, None), is_log=True))
    assert not is_logarithmic(Chart("x", (Line(flat, "x", 1),), bounds=(0, None), is_log=True))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (-0.123456, "−0.123"), (1234.5, "1,234"), (1e-5, "1.0e-05"), (99.95, "100"), (-1e20, "−1.0e+20")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
