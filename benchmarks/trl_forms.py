"""TRL's best form on this machine, by trying them all: batch 1, 2, 4; reference inline or precomputed; checkpointing
off or on. `benchmarks/vs_trl.py --search` runs it and stores what it finds."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.processes import run
from benchmarks.programs import Run, Task, machine_line, pairs_line
from benchmarks.run_trl import TrlForm, run_trl

FORMS = tuple(
    TrlForm(batch, precompute, checkpointing)
    for checkpointing in (False, True)
    for precompute in (False, True)
    for batch in (1, 2, 4)
)
TIE = 1.02  # forms this close are equally good: one of them then serves both comparisons


def search(task: Task, forms: Sequence[TrlForm], note: Callable[[list[dict[str, Any]]], None]) -> None:
    """Try the forms one after the other; `note` is given the rows so far after each."""
    rows: list[dict[str, Any]] = []
    for form in forms:
        try:
            rows.append({"form": asdict(form), **per_pair(task, run(run_trl, task, form))})
        except (RuntimeError, MemoryError) as error:  # a killed process is a RuntimeError too
            rows.append({"form": asdict(form), "error": (str(error) or type(error).__name__).splitlines()[0]})
        print(f"{form}: {rows[-1]}", file=sys.stderr, flush=True)
        note(rows)


def per_pair(task: Task, found: Run) -> dict[str, float]:
    """Seconds per pair of the steps, of the precomputed reference, and of both; the peak."""
    step = sum(found.seconds) / (task.steps * task.pairs_per_step)
    reference = found.reference_seconds / (task.all_steps * task.pairs_per_step)
    return {"step": step, "reference": reference, "first_epoch": step + reference, "peak_gib": found.peak_gib}


def best_forms(rows: Sequence[dict[str, Any]]) -> tuple[TrlForm, TrlForm]:
    """The fastest form once the reference is known, and the fastest one in a first epoch, which pays for it."""
    found = {TrlForm(**row["form"]): row for row in rows if "error" not in row}
    steady = min(found, key=lambda form: found[form]["step"])
    first = min(found, key=lambda form: found[form]["first_epoch"])
    return steady, steady if found[steady]["first_epoch"] <= TIE * found[first]["first_epoch"] else first


def read_best_forms(file: Path) -> tuple[TrlForm, TrlForm]:
    """The best forms of an earlier search.

    Raises:
        SystemExit: there was none for this workload.
    """
    if not file.is_file():
        raise SystemExit(f"{file} is missing: run with --search first, or name a form with --trl_form.")
    return best_forms(json.loads(file.read_text(encoding="utf-8"))["forms"])


def parse_form(text: str) -> TrlForm:
    """`batch=1,precompute=false,checkpointing=false` as a form; what is not named keeps its default."""
    values: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name == "batch" and value.isdecimal() and int(value) > 0:
            values[name] = int(value)
        elif name in ("precompute", "checkpointing") and value in ("true", "false"):
            values[name] = value == "true"
        else:
            raise ArgumentTypeError(f"{part!r} is not batch=N, precompute=true|false or checkpointing=true|false")
    return TrlForm(**values)


def forms_table(results: dict[str, Any]) -> str:
    """The search as a table."""
    task, rows = results["task"], results["forms"]
    lines = [
        f"# TRL's forms: {results['workload']}",
        "",
        machine_line(results["environment"]),
        f"One step of {task['pairs_per_step']} pairs each, not warmed up: {pairs_line(results)}. "
        "A precomputed reference is one pass over the pairs; a first epoch pays for it, later epochs do not.",
        "",
        "| form | step, s/pair | precomputing, s/pair | both, s/pair | peak memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            cells = [row["error"], "", "", ""]
        else:
            cells = [f"{row[name]:.2f}" for name in ("step", "reference", "first_epoch")]
            cells.append(f"{row['peak_gib']:.2f} GiB")
        lines.append(f"| {' | '.join([str(TrlForm(**row['form'])), *cells])} |")
    if any("error" not in row for row in rows):
        steady, first = best_forms(rows)
        lines += ["", f"Fastest with the reference known: {steady}. Fastest in a first epoch: {first}."]
    return "\n".join([*lines, ""])
