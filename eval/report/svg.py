"""Draws a chart as SVG: lines, bands, dots, axes. Colors are classes, so that the page decides them by theme."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from eval.report.series import Point, Series

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    """A series in a chart."""

    series: Series
    label: str
    color: int
    """Number of a color class of the page."""
    is_held_out: bool = False
    """Measured now and then: dots."""


@dataclass(frozen=True)
class Chart:
    """What is drawn in one frame."""

    title: str
    lines: tuple[Line, ...]
    level: tuple[float, str] | None = None
    """A horizontal line with its label."""
    bounds: tuple[float | None, float | None] = (None, None)
    """What the axis reaches at least."""
    is_log: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            math.log10(max(one, 1e-300)) if self.is_log else one for one in (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def short(value: float) -> str:
    """A number as one reads it."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e15 or size < 0.001:
        text = f"{value:.1e}"
    else:
        text = f"{value:,.0f}" if size >= 100 else f"{value:.3g}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def draw(chart: Chart) -> Markup:
    """The chart as an SVG element."""
    x = _steps([line.series for line in chart.lines])
    y = _values(chart)
    last = "; ".join(f"{line.label} {short(line.series.finite[-1].mean or 0)}" for line in chart.lines)
    parts = [
        *_grid(x, y),
        *(part for line in chart.lines for part in _line(line, x, y)),
        *_level(chart, y),
        *_bad_steps(chart, x),
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="0" x2="0" visibility="hidden"/>',
    ]
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{escape(chart.title)}: {escape(last)}" '
        f'data-steps="{x.low:g} {x.high:g} {x.start} {x.end}" data-lines="{_readable(chart)}">'
        + "".join(parts)
        + "</svg>"
    )


def is_logarithmic(chart: Chart) -> bool:
    """Whether its axis goes by powers of ten."""
    return _values(chart).is_log


def sparkline(series: Series) -> Markup:
    """A line as small as a word."""
    points = series.finite
    x = Scale(points[0].step, _above(points[0].step, points[-1].step), 3, 97)
    low, high = min(point.low for point in points), max(point.high for point in points)
    y = Scale(low, _above(low, high), 21, 3)
    path = _path(series.points, x, y)
    end = points[-1]
    dot = f'<circle class="c1" cx="{x(end.step):.1f}" cy="{y(end.mean or 0):.1f}" r="2.5"/>'
    return Markup(f'<svg class="spark" viewBox="0 0 100 24" aria-hidden="true">{path}{dot}</svg>')


def interval_bar(rate: float, low: float, high: float) -> Markup:
    """A share with its interval on a line from 0 to 1, with a mark in the middle."""
    x = Scale(0, 1, 2, 158)
    return Markup(
        '<svg class="interval" viewBox="0 0 160 20" aria-hidden="true">'
        '<line class="rail" x1="2" x2="158" y1="10" y2="10"/>'
        f'<line class="half" x1="80" x2="80" y1="2" y2="18"/>'
        f'<line class="span" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="10" y2="10"/>'
        f'<circle class="c1" cx="{x(rate):.1f}" cy="10" r="4"/></svg>'
    )


def _above(low: float, high: float) -> float:
    """`high`, or something above `low` where the two are the same."""
    return high if high > low else low + (abs(low) * 0.1 or 1.0)


def _steps(found: Sequence[Series]) -> Scale:
    points = [point for series in found for point in series.points]
    low, high = min(point.first for point in points), max(point.last for point in points)
    return Scale(low, _above(low, high) if high > low else low + 1, LEFT, WIDTH - RIGHT)


def _values(chart: Chart) -> Scale:
    """The axis of the values; the level is within it where that does not squeeze the lines."""
    points = [point for line in chart.lines for point in line.series.finite]
    low, high = min(point.low for point in points), max(point.high for point in points)
    if chart.is_log and low > 0 and high > 30 * low:
        return Scale(low / 1.1, high * 1.1, HEIGHT - BOTTOM, TOP, is_log=True)
    low = min([low, *(bound for bound in chart.bounds[:1] if bound is not None)])
    high = max([high, *(bound for bound in chart.bounds[1:] if bound is not None)])
    if chart.level and low - (high - low) <= chart.level[0] <= high + (high - low):
        low, high = min(low, chart.level[0]), max(high, chart.level[0])
    if not math.isfinite(high - low):
        low, high = low / 4, high / 4
    high = _above(low, high)
    pad = 0.05 * (high - low)
    is_bound = [bound is not None and bound == edge for bound, edge in zip(chart.bounds, (low, high), strict=True)]
    return Scale(low - pad * (not is_bound[0]), high + pad * (not is_bound[1]), HEIGHT - BOTTOM, TOP)


def _ticks(scale: Scale, most: int) -> list[float]:
    """Round numbers on the axis."""
    if scale.is_log:
        powers = range(math.ceil(math.log10(scale.low)), math.floor(math.log10(scale.high)) + 1)
        return [10.0**power for power in powers][:: max(1, math.ceil(len(powers) / most))]
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [count * step for count in range(first, last + 1)][: 4 * most]


def _grid(x: Scale, y: Scale) -> Iterator[str]:
    for value in _ticks(y, 4):
        place = f"{y(value):.1f}"
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place}" y2="{place}"/>'
        yield f'<text class="tick y" x="{LEFT - 6}" y="{place}">{_tick(value)}</text>'
    bottom = HEIGHT - BOTTOM
    yield f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    for value in _ticks(x, 4):
        if value == int(value):
            yield f'<text class="tick x" x="{x(value):.1f}" y="{bottom + 15}">{_tick(value)}</text>'


def _tick(value: float) -> str:
    size = abs(value)
    if size >= 1e6 or 0 < size < 0.001:
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    else:
        text = f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"
    return text.replace("-", MINUS, 1) if value < 0 else text


def _level(chart: Chart, y: Scale) -> Iterator[str]:
    if chart.level is None or not y.low <= chart.level[0] <= y.high or (y.is_log and chart.level[0] <= 0):
        return
    place = y(chart.level[0])
    yield f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
    if chart.level[1]:
        above = place - 4 if place > TOP + 14 else place + 11
        yield f'<text class="tick note" x="{WIDTH - RIGHT}" y="{above:.1f}">{escape(chart.level[1])}</text>'


def _line(line: Line, x: Scale, y: Scale) -> Iterator[str]:
    points, color = line.series.finite, f"c{line.color}"
    if line.series.is_grouped and not line.is_held_out:
        edge = [f"{x(point.step):.1f},{y(point.high):.1f}" for point in points]
        edge += [f"{x(point.step):.1f},{y(point.low):.1f}" for point in reversed(points)]
        yield f'<polygon class="band {color}" points="{" ".join(edge)}"/>'
    yield _path(line.series.points, x, y, f"{color}{' held-out' if line.is_held_out else ''}")
    dots = points if len(points) == 1 or (line.is_held_out and len(points) <= 60) else []
    for point in dots:
        yield f'<circle class="{color}" cx="{x(point.step):.1f}" cy="{y(point.mean or 0):.1f}" r="3"/>'


def _path(points: Sequence[Point], x: Scale, y: Scale, color: str = "c1") -> str:
    """A line that is broken where there is nothing to draw."""
    words, pen = [], "M"
    for point in points:
        if point.mean is None:
            pen = "M"
            continue
        words.append(f"{pen}{x(point.step):.1f} {y(point.mean):.1f}")
        pen = "L"
    return f'<path class="line {color}" d="{"".join(words)}"/>'


def _bad_steps(chart: Chart, x: Scale) -> Iterator[str]:
    """A cross on the axis for each step that was not finite, as far as they can be told apart."""
    places = sorted({round(x(step)) for line in chart.lines for step in line.series.bad_steps})
    apart = [place for before, place in pairwise([-99, *places]) if place - before >= 3]
    bottom = HEIGHT - BOTTOM
    for place in apart:
        yield f'<path class="bad" d="M{place - 3} {bottom - 3}l6 6m0 -6l-6 6"/>'


def _readable(chart: Chart) -> Markup:
    """What the page's script shows where the pointer is: first and last step and the mean, by line."""
    lines = [
        [[point.first, point.last, short(point.mean or 0)] for point in line.series.finite] for line in chart.lines
    ]
    return escape(json.dumps(lines, ensure_ascii=False, separators=(",", ":")))
