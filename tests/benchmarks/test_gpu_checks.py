"""The self-checks see what they are there to see, and the levers change the time, not the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu.attention_check import CASES, check
from benchmarks.gpu.engine_checks import check_bench, first_step, packed_against_plain
from benchmarks.gpu.ours import Bench, lever_forms
from benchmarks.gpu.scale import SCALES
from benchmarks.gpu.suites import gate_words, read_report
from qlora_dpo.models import attention

TOKENS = 24


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    yield check_bench(SCALES["tiny"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_passes(case: Any) -> None:
    assert check(case, TOKENS).values["passed"]


def test_upper_left_attention_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def upper_left(queries: int, keys: int, back: int, device: torch.device) -> torch.Tensor:
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()

    monkeypatch.setattr(attention, "_segment_mask", upper_left)
    assert not check(CASES[0], TOKENS).values["passed"]


def test_a_window_that_is_off_by_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = attention._segment_mask
    monkeypatch.setattr(attention, "_segment_mask", lambda q, k, back, device: own(q, k, back - 1, device))
    assert not check(CASES[2], 300).values["passed"]


@pytest.mark.slow
def test_every_lever_gives_the_same_loss(bench: Bench) -> None:
    bench.fill_reference()
    losses = {}
    for name, form in lever_forms().items():
        engine = bench.engine(form)
        losses[name] = engine.accumulate_gradient(bench.step_indices(0)[:2], lambda: None)["loss"]
        bench.model.zero_grad(set_to_none=True)
    assert max(losses.values()) - min(losses.values()) < 5e-3, losses


@pytest.mark.slow
def test_scoring_checks_pass_and_see_a_wrong_position(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_step(bench).values["passed"]
    assert all(row.values["passed"] for row in packed_against_plain(bench))
    own = attention._segment_mask
    monkeypatch.setattr(attention, "_segment_mask", lambda q, k, back, device: own(q, k, 1, device))
    assert not any(row.values["passed"] for row in packed_against_plain(bench))


def test_pytests_report_is_read() -> None:
    xml = """<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="x"/></testcase>
    <testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>"""
    assert read_report(xml) == ({"passed": 1, "failed": 2, "skipped": 1}, ["b", "d"])


def test_demos_numbers_are_found() -> None:
    output = "x\nHeld-out reward accuracy       1.000\nFrom terse to explained        107 of 108 (99 %)\n"
    assert gate_words(output) == "Held-out reward accuracy 1.000; From terse to explained 107 of 108 (99 %)"
