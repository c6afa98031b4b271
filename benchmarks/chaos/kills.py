"""Kills: at any moment, and at every change that a run makes to its folder."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.chaos.bench import Bench, Row, log_of, newest_checkpoint, steps_recorded
from benchmarks.chaos.victims import Prepare
from benchmarks.chaos.watching import Crash, Event, Trace, read_trace
from benchmarks.chaos.workload import SAVE_STEPS, STEPS

Item = TypeVar("Item")
REPEATED_EVERY = 4  # trials one is killed several times before it may finish


def kill_rows(bench: Bench, count: int) -> list[Row]:
    """Kill runs at random moments, then give the same command until it has finished.

    Every other one is killed in a certain step, all of which are tried, so that it is not the machine's speed that
    decides how many trials fall into the training.
    """
    row = Row("kill", "`kill -9` at any moment: the same command again ends with the same adapter and the same record.")
    rng, phases, repeated = bench.rng("kill"), Counter[str](), 0
    for number in range(count):
        kills = rng.randint(2, 4) if number % REPEATED_EVERY == REPEATED_EVERY - 1 else 1
        with bench.scratch() as run:
            moments, steps = [], number * STEPS // count if number % 2 else None
            for _ in range(kills):
                moments.append(kill(bench, run, rng, spawned=bench.spawns(number), steps=steps))
                phases[phase(run)] += 1
                repeated = max(repeated, steps_recorded(run) - newest_checkpoint(run))
            row.add(bench.to_the_end(run), f"trial {number + 1}, killed after {', '.join(moments)} s")
    places = ", ".join(f"{count} {name}" for name, count in sorted(phases.items()))
    row.worst = f"{repeated} steps to repeat; {places}"
    return [row]


def kill(bench: Bench, run: Path, rng: random.Random, *, spawned: bool, steps: int | None) -> str:
    """Start the command and kill it after a random part of its usual duration, or of a step's once so many `steps` are
    in its record; says when."""
    victim = bench.start(run, spawned=spawned)
    moment = bench.wait(victim, run, rng, spawned=spawned, steps=steps)
    if victim.wait(0) is None:
        victim.send(signal.SIGKILL)
        victim.wait()
    return f"{moment:.2f}"


def phase(run: Path) -> str:
    """How far a killed run had come."""
    steps = steps_recorded(run)
    if (run / "adapter_model.safetensors").exists() or newest_checkpoint(run) == STEPS:
        return "while finishing or after"
    return f"from step 1 to {STEPS}" if steps else "before the first step"


def crash_rows(bench: Bench, most: int | None) -> list[Row]:
    """Kill a fresh run and a continued one at every change of their folder, or at `most` of these points each."""
    rng = bench.rng("crash points")
    fresh = trace(bench, None)
    first = next(event.number for event in fresh if event.path == f"checkpoint-{SAVE_STEPS}")
    last_save = bench.killed_at_the_last_save()
    tries = [
        ("start", None, "the start of a run, its first steps and first checkpoints", fresh[:first]),
        ("finish", last_save, "continuing, the last steps, a checkpoint that replaces another, the finish",
         trace(bench, last_save)),
    ]  # fmt: skip
    rows = []
    for name, template, where, events in tries:
        points = [(event, torn) for event in events for torn in (False, True) if event.is_write or not torn]
        row = Row(f"crash points: {name}", f"Killed at every change of the folder ({where}): as above.")
        for event, torn in spread(points, most, rng) if most else points:
            crash(bench, row, template, event, torn)
        row.worst = f"{row.trials} of {len(points)} points; {sum(torn for _, torn in points)} leave half a file"
        rows.append(row)
    return rows


def spread(points: Sequence[Item], count: int, rng: random.Random) -> list[Item]:
    """That many of the points, equally far from each other."""
    distance = len(points) / count
    return [points[int((number + offset) * distance)] for offset in [rng.random()] for number in range(count)]


def crash(bench: Bench, row: Row, template: Path | None, event: Event, torn: bool) -> None:
    """One trial: the run must have died at the point, and continue from there."""
    with bench.scratch(template) as run:
        code = bench.start(run, before=[Crash(run, event.number, torn)]).wait()
        problems = [] if code == -signal.SIGKILL else [f"the run never came there: it ended with {code}"]
        kind = f"{'half written' if torn else 'before'} {event.name} {event.path}"
        row.add(problems or bench.to_the_end(run), f"event {event.number}, {kind}")


def trace(bench: Bench, template: Path | None) -> list[Event]:
    """Every change that an undisturbed run makes to its folder."""
    with bench.scratch(template) as run:
        output = run.with_name("trace")
        before: list[Prepare] = [Trace(run, output)]
        code = bench.start(run, before=before).wait()
        if code != 0:
            raise RuntimeError(f"an undisturbed run ended with {code}: {log_of(run).read_text()[-3000:]}")
        return read_trace(output)
