"""The comparison with TRL: like is compared with like, nothing is left out, and a tiny one runs to its table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import trl_forms, vs_trl
from benchmarks.processes import ROOT, peak_gib, run
from benchmarks.programs import Run, Task
from benchmarks.run_ours import OurForm
from benchmarks.run_trl import TrlForm
from benchmarks.trl_forms import FORMS, best_forms, parse_form, per_pair, search
from benchmarks.vs_trl import largest_difference, make_rows, read_row

INLINE, PRECOMPUTED = TrlForm(), TrlForm(precompute=True)
TASK = Task("model", "pairs.json", pairs_per_step=4, steps=2)


def tried(form: TrlForm, step: float, reference: float = 0.0) -> dict[str, Any]:
    return {"form": asdict(form), "step": step, "reference": reference, "first_epoch": step + reference}


def a_run(seconds: list[float], reference_seconds: float = 0.0) -> Run:
    return Run([0.7, 0.6, 0.5], seconds, reference_seconds, loaded_gib=0.5, peak_gib=1.0, load_average=0.1)


def test_every_form_is_tried() -> None:
    assert len(set(FORMS)) == 12
    assert {form.batch for form in FORMS} == {1, 2, 4}


def test_best_form_pays_for_its_reference_in_a_first_epoch() -> None:
    rows = [tried(INLINE, 10.0), tried(PRECOMPUTED, 7.0, 4.0)]
    assert best_forms(rows) == (PRECOMPUTED, INLINE)
    rows[1] = tried(PRECOMPUTED, 7.0, 3.1)  # a tie within what machines do
    assert best_forms(rows) == (PRECOMPUTED, PRECOMPUTED)


def test_a_form_that_dies_is_reported_and_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed_when_inline(_program: Any, _task: Task, form: TrlForm) -> Run:
        if form == INLINE:
            raise RuntimeError("killed")
        return a_run([8.0, 8.0], reference_seconds=12.0)

    monkeypatch.setattr(trl_forms, "run", killed_when_inline)
    noted: list[int] = []
    rows: list[dict[str, Any]] = []

    def note(found: list[dict[str, Any]]) -> None:
        noted.append(len(found))
        rows[:] = found

    search(TASK, [INLINE, PRECOMPUTED], note)
    assert noted == [1, 2]
    assert rows[0]["error"] == "killed"
    assert (rows[1]["step"], rows[1]["reference"]) == (2.0, 1.0)  # 16 s over 8 pairs; 12 s over 12, warm-up included
    assert best_forms(rows) == (PRECOMPUTED, PRECOMPUTED)


def test_the_reference_is_divided_over_the_pairs_it_scored() -> None:
    found = per_pair(TASK, a_run([4.0, 12.0], reference_seconds=6.0))
    assert found == {"step": 2.0, "reference": 0.5, "first_epoch": 2.5, "peak_gib": 1.0}


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("batch=2,precompute=true,checkpointing=true", TrlForm(2, True, True)),
        ("batch=4", TrlForm(4)),
        ("precompute=false", TrlForm()),
    ],
)
def test_form_is_read(text: str, form: TrlForm) -> None:
    assert parse_form(text) == form


@pytest.mark.parametrize("text", ["batch=x", "batch=true", "batch=0", "precompute=2", "bach=2", "precompute"])
def test_form_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        parse_form(text)


def test_search_pairs_that_have_no_batches_of_four_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vs_trl.py", "--search", "--search_pairs", "6"])
    with pytest.raises(SystemExit):
        vs_trl.main()
    assert "multiple of 4" in capsys.readouterr().err


def test_like_is_compared_with_like() -> None:
    rows = {row.name: row for row in make_rows(PRECOMPUTED, INLINE, max_tokens=64, lean=True)}
    known, first, lean = (row for row in rows.values() if isinstance(row.program, OurForm))
    assert rows[str(known.against)].program == PRECOMPUTED
    assert rows[str(first.against)].program == INLINE
    assert rows[str(lean.against)].program == TrlForm(precompute=True, checkpointing=True)
    assert isinstance(lean.program, OurForm) and lean.program.checkpointing == "full" and lean.program.max_tokens == 64
    assert not any(row.counts_reference for row in rows.values())


def test_a_precomputed_reference_is_counted_against_a_first_epoch() -> None:
    rows = {row.name: row for row in make_rows(PRECOMPUTED, PRECOMPUTED, max_tokens=64, lean=False)}
    known, first = (row for row in rows.values() if isinstance(row.program, OurForm))
    assert not rows[str(known.against)].counts_reference and rows[str(first.against)].counts_reference
    results = {
        "task": asdict(TASK),
        "runs": {str(PRECOMPUTED): [asdict(a_run([4.0, 5.0], 6.0)), asdict(a_run([4.0, 6.0], 9.0))]},
    }
    for against, seconds in ((known.against, [4.0, 5.0, 4.0, 6.0]), (first.against, [6.0, 7.0, 7.0, 9.0])):
        row = asdict(rows[str(against)]) | {"program": str(PRECOMPUTED)}
        assert read_row(row, results)["seconds"] == seconds


def test_largest_difference_looks_at_every_step_of_every_run() -> None:
    assert largest_difference([[0.7, 0.5]], [[0.7, 0.5], [0.7, 0.75]]) == pytest.approx(0.25)


@pytest.mark.slow
def test_a_process_does_not_inherit_its_parents_peak() -> None:
    ballast = bytearray(b"x") * 2**30
    own = peak_gib()
    del ballast
    assert own > 1.0 and run(peak_gib) < 0.8


@pytest.mark.slow
def test_what_a_process_raises_arrives() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="bach"):
        run(parse_form, "bach=2")


def test_a_killed_process_is_an_error_and_not_the_end() -> None:
    with pytest.raises(RuntimeError, match="terminated"):
        run(os._exit, 9)
    assert run(os.getpid) != os.getpid()


def test_what_starts_the_processes_stays_small() -> None:
    code = "import sys, benchmarks.vs_trl, benchmarks.scaling; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_a_search_the_way_out_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/vs_trl.py", "--workload", "tiny", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "--search" in result.stderr and "--trl_form" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_tiny_comparison_runs_to_its_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["vs_trl.py", "--workload", "tiny", "--output", str(tmp_path), *arguments])
        vs_trl.main()

    monkeypatch.setattr(vs_trl, "FORMS", (TrlForm(4, precompute=True),))
    main("--search", "--search_pairs", "4")
    assert "precomputed" in (tmp_path / "trl_forms_tiny.md").read_text()
    main("--rounds", "1", "--steps", "1", "--max_tokens", "128")

    results = json.loads((tmp_path / "vs_trl_tiny.json").read_text())
    assert results["source"].startswith("random") and results["max_tokens"] == 128
    assert all(len(found) == 1 and len(found[0]["seconds"]) == 1 for found in results["runs"].values())
    ours = [found[0] for name, found in results["runs"].items() if name.startswith("ours")]
    (trl,) = (found[0] for name, found in results["runs"].items() if name.startswith("TRL"))
    assert trl["reference_seconds"] > 0 and [found["reference_seconds"] > 0 for found in ours] == [True, False]
    assert largest_difference([found["losses"] for found in ours], [trl["losses"], results["plain"]["losses"]]) < 5e-3
    table = (tmp_path / "vs_trl_tiny.md").read_text()
    assert table.count(" x A |") == 2 and table.count(" x C |") == 2
