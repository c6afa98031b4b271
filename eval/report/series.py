"""Metrics as points to draw: of a long run each point stands for several steps, with their mean, least and most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 200  # that are drawn as they are
GROUPS = 150  # of steps, where there are more


@dataclass(frozen=True, slots=True)
class Point:
    """A group of steps, usually of one; `mean` is None where none of its numbers is finite."""

    first: int
    last: int
    mean: float | None
    low: float = 0.0
    high: float = 0.0

    @property
    def step(self) -> float:
        """Its place on the axis."""
        return (self.first + self.last) / 2


@dataclass(frozen=True)
class Series:
    """A metric over the steps."""

    key: str
    points: tuple[Point, ...]
    bad_steps: tuple[int, ...] = ()
    """Where it was not finite."""

    @property
    def is_grouped(self) -> bool:
        """Whether points stand for several steps."""
        return any(point.first != point.last for point in self.points)

    @property
    def finite(self) -> list[Point]:
        """The points that can be drawn."""
        return [point for point in self.points if point.mean is not None]


def series(rows: Sequence[dict[str, Any]], key: str) -> Series | None:
    """What was logged under `key`; None where nothing was."""
    logged = [(row["step"], row[key]) for row in rows if _is_number(row.get(key))]
    return _grouped(key, logged)


def derived(rows: Sequence[dict[str, Any]], key: str, over: str, name: str) -> Series | None:
    """A metric divided by another one, or by a number that all rows share."""
    logged = [
        (row["step"], row[key] / row[over])
        for row in rows
        if _is_number(row.get(key)) and _is_number(row.get(over)) and row[over]
    ]
    return _grouped(name, logged)


def scaled(found: Series | None, factor: float, name: str) -> Series | None:
    """The series times a number."""
    if found is None or not math.isfinite(factor):
        return None
    points = [
        point
        if point.mean is None
        else Point(point.first, point.last, point.mean * factor, *sorted((point.low * factor, point.high * factor)))
        for point in found.points
    ]
    return Series(name, tuple(points), found.bad_steps)


def _grouped(key: str, logged: Sequence[tuple[int, float]]) -> Series | None:
    if not logged:
        return None
    bad = tuple(step for step, value in logged if not math.isfinite(value))
    if len(logged) <= MOST_POINTS:
        return Series(key, tuple(_point([one]) for one in logged), bad)
    groups: dict[int, list[tuple[int, float]]] = {}
    first, width = logged[0][0], (logged[-1][0] - logged[0][0] + 1) / GROUPS
    for step, value in logged:
        groups.setdefault(int((step - first) / width), []).append((step, value))
    return Series(key, tuple(map(_point, groups.values())), bad)


def _point(members: Sequence[tuple[int, float]]) -> Point:
    finite = [value for _, value in members if math.isfinite(value)]
    first, last = members[0][0], members[-1][0]
    if not finite:
        return Point(first, last, None)
    try:
        mean = math.fsum(finite) / len(finite)
    except OverflowError:
        mean = math.fsum(value / len(finite) for value in finite)
    return Point(first, last, mean, min(finite), max(finite))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 10**300)
