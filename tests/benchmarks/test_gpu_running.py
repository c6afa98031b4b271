"""What was measured is kept, whatever happens to the process that measures."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import running
from benchmarks.gpu.child import run_job
from benchmarks.gpu.jobs import ALL_LEVERS, ATTENTION_CASES, ENGINE_CHECKS, Job, make_jobs
from benchmarks.gpu.rows import NEEDS_CUDA, Row, RowFile, merged
from benchmarks.gpu.running import only, run_all, run_group
from benchmarks.gpu.scale import SCALES

MEASURES_ONE_THEN_SLEEPS = """
import json, sys, time
jobs, rows = sys.argv[1:]
with open(rows, "a") as file:
    file.write(json.dumps({"table": "t", "name": "a", "values": {"seconds": 1}, "note": "", "time": ""}) + "\\n")
    file.write('{"table": "t", "na')
    file.flush()
    time.sleep(SLEEP)
"""


def job(name: str, **values: Any) -> Job:
    return Job("part", f"made:{name}", {}, (("t", "a"), ("t", "b")), 30.0, **values)


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, sleep: float) -> None:
    script = folder / "child.py"
    script.write_text(MEASURES_ONE_THEN_SLEEPS.replace("SLEEP", str(sleep)))
    monkeypatch.setattr(running, "CHILD", (sys.executable, str(script)))
    monkeypatch.setattr(running, "POLL_SECONDS", 0.05)


def test_a_process_whose_time_is_over_keeps_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child(monkeypatch, tmp_path, sleep=60)
    noted: list[int] = []
    started = time.monotonic()
    rows = run_group([job("any")], 1.5, lambda rows: noted.append(len(rows)))
    assert time.monotonic() - started < 10
    assert [(row.name, row.values, row.note) for row in rows] == [
        ("a", {"seconds": 1}, ""),
        ("b", {}, "stopped after 2 s"),
    ]
    assert noted == [1, 2]


def test_a_process_that_dies_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(running, "CHILD", (sys.executable, "-c", "import os; os._exit(9)"))
    rows = run_group([job("any")], 20, lambda rows: None)
    assert {row.note for row in rows} == {"the process ended with 9"}


def test_no_job_is_begun_without_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child(monkeypatch, tmp_path, sleep=0)
    assert run_all([job("any")], running.LEAST_SECONDS - 1, lambda rows: None) == []
    groups: list[list[Job]] = []
    monkeypatch.setattr(running, "run_group", lambda group, limit, note: groups.append(group) or [])
    jobs = [job("one"), job("two", joins=True), job("three")]
    run_all(jobs, 60, lambda rows: None)
    run_all(jobs, 60, lambda rows: None, together=True)
    assert groups == [jobs[:2], jobs[2:], jobs]


def test_a_job_that_fails_says_so_in_the_rows_it_owes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half() -> Any:
        yield Row("t", "a", {"seconds": 1})
        raise ValueError("broken\nsecond line")

    monkeypatch.setitem(sys.modules, "made", SimpleNamespace(half=half))
    file = RowFile(tmp_path / "rows")
    run_job(job("half").as_dict(), file)
    run_job(job("half", needs_cuda=True).as_dict(), RowFile(tmp_path / "cuda"))
    assert [(row.name, row.note) for row in file.rows()] == [("a", ""), ("b", "ValueError: broken")]
    import torch

    if not torch.cuda.is_available():
        assert {row.note for row in RowFile(tmp_path / "cuda").rows()} == {NEEDS_CUDA}


def test_a_note_never_replaces_a_measurement() -> None:
    measured, note, again = Row("t", "a", {"x": 1}), Row("t", "a", note="stopped"), Row("t", "a", {"x": 2})
    assert merged([measured], [note]) == [measured] and merged([note], [measured]) == [measured]
    assert merged([measured], [again]) == [again]


def test_continuing_measures_what_is_owed_and_nothing_else() -> None:
    jobs = make_jobs(SCALES["real"])
    parts = [one.part for one in jobs]
    assert only(jobs, parts, []) == jobs
    everything = [Row(table, name, {"x": 1}) for one in jobs for table, name in one.rows]
    assert only(jobs, parts, everything) == []
    lever, case = ("levers", "7B: only packing"), ("memory", "70B, r=64, 2048 tokens")
    left = only(jobs, parts, [row for row in everything if (row.table, row.name) not in (lever, case)])
    assert [one.rows for one in left] == [(lever,), (case,)]
    assert left[0].arguments["levers"] == ["only packing"] and left[1].arguments["cases"] == [(64, 2048)]
    assert only(jobs, ["checks"], [])[0].part == "checks"
    assert all(one.part == "memory" for one in only(jobs, ["memory"], []))


@pytest.mark.slow  # imports torch and everything on it
def test_rows_that_jobs_owe_are_those_that_functions_give() -> None:
    from benchmarks.gpu.attention_check import CASES
    from benchmarks.gpu.ours import lever_forms

    assert tuple(case.name for case in CASES) == ATTENTION_CASES
    assert set(ALL_LEVERS) | {"all levers"} == set(lever_forms())
    assert len(set(ENGINE_CHECKS)) == 6
    for scale in SCALES.values():
        for one in make_jobs(scale):
            json.dumps(one.as_dict())


def test_exit_code_tells_what_is_bad() -> None:
    assert Row("t", "a", {"passed": False}).is_bad and Row("t", "a", {"fits": False}).is_bad
    assert Row("t", "a", note="ImportError: no").is_bad and Row("t", "a", note="the process ended with 9").is_bad
    for row in (
        Row("t", "a", {"passed": True}),
        Row("t", "a", note=NEEDS_CUDA),
        Row("t", "a", note="stopped after 3 s"),
    ):
        assert not row.is_bad
