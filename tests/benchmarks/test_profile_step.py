"""The profile of a step: every operation belongs to one part, and a tiny run writes its table."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks import profile_step
from benchmarks.profile_step import ADAPTER, BASE, PARTS, REST, part_of


@dataclass
class Event:
    name: str
    cpu_parent: Event | None = None
    input_shapes: list[list[int]] = field(default_factory=list)


LAYER = Event("_LoraLinear")
GEMM = Event("bitsandbytes::gemm_4bit", LAYER)


@pytest.mark.parametrize(
    ("event", "part"),
    [
        (Event("aten::mm", Event("aten::linear", GEMM), [[700, 1024], [1024, 64]]), BASE),
        (Event("aten::copy_", Event("bitsandbytes::dequantize_4bit", GEMM)), "dequantization"),
        (Event("aten::addmm_", LAYER, [[700, 1024], [700, 64], [64, 1024]]), ADAPTER),
        (Event("aten::mm", Event("_LoraLinearBackward"), [[700, 1024], [1024, 1024]]), BASE),
        (Event("aten::copy_", LAYER), ADAPTER),
        (Event("aten::mm", Event("_TokenLogps"), [[300, 1024], [1024, 2048]]), "head and log-probs"),
        (Event("aten::mul", Event("_RMSNormBackward")), "norms"),
        (Event("aten::mul"), "elementwise: SwiGLU, residuals"),
        (Event("aten::mul", Event("Optimizer.step#AdamW.step")), "optimizer and clipping"),
        (Event("aten::empty"), REST),
    ],
)
def test_operation_belongs_to_a_part(event: Event, part: str) -> None:
    assert part in PARTS and part_of(event, rank=64) == part


@pytest.mark.slow
def test_tiny_run_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--tiny", "--output", str(tmp_path)])
    profile_step.main()
    results = json.loads((tmp_path / "profile_step.json").read_text())
    parts = results["parts"]
    assert list(parts) == list(PARTS) and all(seconds > 0 for seconds in parts.values()), parts
    # Nothing is counted twice, and little escapes the profiler.
    assert 0.5 * results["profiled_seconds"] < sum(parts.values()) <= 1.01 * results["profiled_seconds"]
    assert (tmp_path / "profile_step.md").read_text().count("| ") > 2 * len(PARTS)


def test_tiny_numbers_do_not_replace_the_measured_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--tiny"])
    with pytest.raises(SystemExit):
        profile_step.main()
    assert "--output" in capsys.readouterr().err
