"""The scaling benchmark: its points are what they say, its lines are straight, and a tiny one draws its picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling import BASE, FACTORS, LEVELS, TINY_VALUES, Point, straight_line, varied


def test_a_pair_has_the_tokens_of_its_point() -> None:
    for factor, values, _ in FACTORS:
        for value in values:
            point = varied(BASE, factor, value)
            prompt, chosen, rejected = point.lengths()
            assert prompt > 0 and chosen == rejected > 0
            assert prompt + chosen + rejected == point.tokens
            assert (chosen + rejected) / point.tokens == pytest.approx(point.share, abs=0.01)


def test_every_factor_is_varied_around_the_base() -> None:
    for factor, values, _ in FACTORS:
        assert len(values) >= 3 and getattr(BASE, factor) in values
    assert {factor for factor, _, _ in FACTORS} == set(Point.__dataclass_fields__)


def rows(seconds: list[float]) -> list[dict[str, Any]]:
    return [{"step_tokens": 1000 * 2**n, "none": {"seconds": value}} for n, value in enumerate(seconds)]


def test_a_linear_cost_is_a_straight_line_of_ratio_one() -> None:
    line = straight_line(rows([0.5, 1.0, 2.0, 4.0]), "none")
    assert line["seconds_per_1000_tokens"] == pytest.approx(0.5)
    assert (line["r_squared"], line["ratio"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert line["intercept"] == pytest.approx(0.0, abs=1e-9)


def test_a_quadratic_cost_is_seen() -> None:
    line = straight_line(rows([1.0, 4.0, 16.0, 64.0]), "none")
    assert line["ratio"] == pytest.approx(8.0) and line["r_squared"] < 0.98


def test_tiny_numbers_do_not_replace_measured_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--tiny"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "--output" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_sweep_runs_to_its_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--tiny", "--output", str(tmp_path)])
    scaling.main()
    results = json.loads((tmp_path / "scaling.json").read_text())
    for factor, _, title in FACTORS:
        sweep = results["sweeps"][factor]
        assert len({row["point"][factor] for row in sweep}) == len(sweep) == len(TINY_VALUES[factor])
        assert all(row[level]["seconds"] > 0 and row[level]["peak_gib"] > 0.1 for row in sweep for level in LEVELS)
        assert f"| {title} |" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
