"""Runs the jobs within a budget of minutes, each in a process of its own, and keeps what each has measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.jobs import Job
from benchmarks.gpu.rows import STOPPED, Row, RowFile
from benchmarks.processes import ROOT

LEAST_SECONDS = 15.0  # with less left no job is begun
POLL_SECONDS = 0.5
CHILD = (sys.executable, "-m", "benchmarks.gpu.child")


def run_all(
    jobs: Sequence[Job], budget: float, note: Callable[[list[Row]], None], *, together: bool = False
) -> list[Row]:
    """Run the jobs in order until the budget of seconds is used; `note` is given all rows whenever there are new ones.

    `together` runs them in one process, which saves importing the libraries for each.
    """
    deadline = time.monotonic() + budget
    found: list[Row] = []
    groups: list[list[Job]] = []
    for job in jobs:
        if groups and (together or job.joins):
            groups[-1].append(job)
        else:
            groups.append([job])
    for group in groups:
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            say(f"out of time: {len(groups) - groups.index(group)} jobs were not begun")
            break
        limit = min(left, sum(job.seconds for job in group))
        started = time.monotonic()
        earlier = list(found)
        rows = run_group(group, limit, lambda rows, earlier=earlier: note([*earlier, *rows]))
        found += rows
        names = ", ".join(dict.fromkeys(job.call.rpartition(":")[2] for job in group))
        say(f"{names}: {len(rows)} rows in {time.monotonic() - started:.0f} s")
    return found


def run_group(group: Sequence[Job], limit: float, note: Callable[[list[Row]], None]) -> list[Row]:
    """Run jobs in a new process; what it had measured when its time was over is kept, the rest says so."""
    with tempfile.TemporaryDirectory() as folder:
        jobs, rows = Path(folder) / "jobs.json", RowFile(Path(folder) / "rows.jsonl")
        jobs.write_text(json.dumps([job.as_dict() for job in group]), encoding="utf-8")
        command = [*CHILD, str(jobs), str(rows.file)]
        environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sys.stderr, start_new_session=True)
        try:
            watch(child, rows, limit, note)
            in_time = child.poll() is not None
        finally:
            end(child)
        found = rows.rows()
        reason = f"the process ended with {child.returncode}" if in_time else f"{STOPPED} {limit:.0f} s"
    missing = {key for job in group for key in job.rows} - {(row.table, row.name) for row in found}
    found += [Row(table, name, note=reason) for table, name in sorted(missing)]
    note(found)
    return found


def watch(child: subprocess.Popen[bytes], rows: RowFile, limit: float, note: Callable[[list[Row]], None]) -> None:
    """Wait for the process, at most `limit` seconds, and hand on the rows that it writes."""
    deadline, count = time.monotonic() + limit, 0
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        found = rows.rows()
        if len(found) > count:
            count = len(found)
            note(found)


def end(child: subprocess.Popen[bytes]) -> None:
    """End the process and what it started, which are a group of their own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def only(jobs: Sequence[Job], parts: Sequence[str], measured: Sequence[Row]) -> list[Job]:
    """The jobs of these parts that still owe rows, cut down to what they owe."""
    known = {(row.table, row.name) for row in measured if row.is_settled}
    chosen = []
    for job in jobs:
        owed = tuple(key for key in job.rows if key not in known)
        if job.part in parts and any(table != "models" for table, _ in owed):
            chosen.append(replace(job, rows=owed, arguments=job.arguments_for(owed)))
    return chosen


def say(words: str) -> None:
    """A line for who watches."""
    print(words, file=sys.stderr, flush=True)
