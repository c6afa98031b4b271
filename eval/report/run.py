"""Reads all that a run folder tells, whatever state the run is in: what is missing or torn is left out, and said."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml

from eval.answers import ANSWERS, FOLDER, SUMMARY, Row, Verdict, read_answers, read_summary, read_verdicts
from qlora_dpo.errors import QloraDpoError, StorageError
from qlora_dpo.training.folder.owned import NEW
from qlora_dpo.training.folder.run_folder import CARD, CONFIG, METRICS, SAMPLES, STATUS
from qlora_dpo.training.folder.run_lock import LOCK

DEMO, MERGE, DATA = "before_after.json", "merge_report.json", "data.json"
QUIET_SECONDS = 60 * 60  # after which a run on another machine that logs nothing counts as stopped

State = Literal["finished", "going", "stopped", "new"]
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """What `python -m eval compare` found."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    verdicts: Sequence[Verdict] = ()
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """Everything that the page shows of a run."""

    path: Path
    config: dict[str, Any]
    status: dict[str, Any]
    state: State
    since: str
    """When it began to run, where it is going on; else when it last wrote something."""
    metrics: Rows
    """By step, a row per step."""
    samples: Rows
    demo: dict[str, Any]
    data: dict[str, Any]
    data_lines: list[str]
    merge: dict[str, Any]
    comparison: Comparison | None
    notes: list[str]
    """What could not be read."""

    @property
    def objective(self) -> str:
        """dpo or sft."""
        return str(self.config.get("objective", "dpo"))

    @property
    def steps(self) -> int:
        """Steps that were logged."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def total_steps(self) -> int | None:
        """Steps that the run will have; None before it knows."""
        total = self.status.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def hours(self) -> float:
        """Of training steps; a line of metrics.jsonl stands for the steps since the line before."""
        seconds, before = 0.0, 0
        for row in self.metrics:
            seconds += number(row.get("step_seconds")) * (row["step"] - before)
            before = row["step"]
        return seconds / 3600

    @property
    def hours_left(self) -> float | None:
        """At the speed of the last steps."""
        if self.total_steps is None or self.state == "finished" or not self.metrics:
            return None
        recent = [number(row.get("step_seconds")) for row in self.metrics[-20:]]
        return max(0, self.total_steps - self.steps) * sum(recent) / len(recent) / 3600


def number(value: Any) -> float:
    """A finite number, else 0."""
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else 0.0


def read_run(path: Path, comparison: Path | None = None) -> Run:
    """Read a run and the comparison that belongs to it.

    Raises:
        StorageError: there is no such folder, it holds no run, or its config.yaml cannot be read; or the comparison
            that was named is not there.
    """
    _check_run(path)
    notes: list[str] = []
    status = _read_object(path / STATUS, notes)
    holder = _read_object(path / LOCK, [])
    metrics = _by_step(read_rows(path / METRICS, notes))
    state = _state(path, status, holder)
    return Run(
        path=path.resolve(),
        config=_read_config(path / CONFIG),
        status=status,
        state=state,
        since=str(holder.get("since", "")) if state == "going" else _last_written(path),
        metrics=metrics,
        samples=read_rows(path / SAMPLES, notes),
        demo=_read_object(path / DEMO, notes),
        data=_read_object(path / DATA, notes),
        data_lines=_data_of_card(path / CARD),
        merge=_read_object(path / MERGE, notes),
        comparison=_read_comparison(comparison or path / FOLDER, comparison is not None, notes),
        notes=notes,
    )


def _check_run(path: Path) -> None:
    if not path.exists():
        raise StorageError(f"{path} is not there. Name the folder of a run (--output_dir of train).")
    if not (path / CONFIG).is_file():
        kind = "a folder" if path.is_dir() else "a file"
        raise StorageError(
            f"{path} is {kind} but no run: it has no {CONFIG}. Name the folder of a run (--output_dir of train)."
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise StorageError(
            f"{file} cannot be read ({type(error).__name__}), so nobody knows what this run is. Restore it."
        ) from error


def read_rows(file: Path, notes: list[str]) -> Rows:
    """The objects of a file of JSON lines; a torn last line belongs to a run that is writing, others are noted."""
    if not file.is_file():
        return []
    lines = [line for line in file.read_bytes().split(b"\n") if line.strip()]
    rows, bad = [], []
    for place, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif place < len(lines):
            bad.append(place)
    if bad:
        notes.append(f"{file.name}: {len(bad)} of {len(lines)} lines cannot be read, the first is line {bad[0]}.")
    return rows


def _by_step(rows: Rows) -> Rows:
    """One row per step, in order; of a step that was logged twice the last one."""
    steps = {row["step"]: row for row in rows if type(row.get("step")) is int}
    return [steps[step] for step in sorted(steps)]


def _read_object(file: Path, notes: list[str]) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{file.name} cannot be read: {error}.")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{file.name} holds no object.")
        return {}
    return content


def _state(path: Path, status: dict[str, Any], holder: dict[str, Any]) -> State:
    if holder and _is_alive(path, holder):
        return "going"
    if status.get("status") == "finished":
        return "finished"
    return "new" if status.get("status", NEW) == NEW else "stopped"


def _is_alive(path: Path, holder: dict[str, Any]) -> bool:
    """Whether the process that the lock names still runs; of another machine only its files tell."""
    if holder.get("host") != socket.gethostname():
        return time.time() - _newest(path) < QUIET_SECONDS
    pid = holder.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def _newest(path: Path) -> float:
    files = [path / name for name in (METRICS, STATUS, CONFIG)]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def _last_written(path: Path) -> str:
    return f"{datetime.fromtimestamp(_newest(path)):%F %T}"


def _data_of_card(file: Path) -> list[str]:
    """The account of the data in the card of a finished run."""
    with suppress(OSError, ValueError):
        section = file.read_text(encoding="utf-8").partition("\n## Data\n")[2].partition("\n## ")[0]
        return [line.removeprefix("- ").strip() for line in section.splitlines() if line.strip()]
    return []


def _read_comparison(folder: Path, is_named: bool, notes: list[str]) -> Comparison | None:
    """A comparison, finished or going on."""
    if not (folder / ANSWERS).is_file() and not (folder / SUMMARY).is_file():
        if is_named:
            raise StorageError(f"{folder} holds no comparison. Make one with `python -m eval compare`.")
        return None
    found: dict[str, Any] = {"folder": folder}
    try:
        if (folder / ANSWERS).is_file():
            found["settings"], found["rows"] = read_answers(folder)
        found["verdicts"] = read_verdicts(folder)
        if (folder / SUMMARY).is_file():
            found["summary"] = read_summary(folder)
    except QloraDpoError as error:
        notes.append(str(error))
    return Comparison(**found)
