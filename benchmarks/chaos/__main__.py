"""Breaks runs of a tiny model on purpose, and writes a table of what the tool promised and what it kept.

python -m benchmarks.chaos                  everything: results/chaos.{json,md}
python -m benchmarks.chaos --chaos 200      200 kills and 400 signals
python -m benchmarks.chaos --reduced        a few of each, in a minute or two; writes nothing unless --output is given
python -m benchmarks.chaos --only signals   some of the rows; with --output they replace those of an earlier run there
python -m benchmarks.chaos --only kill --break no-random-states
                                            the tool broken on purpose: the row must fail

The exit code is 1 where a promise was not kept, or where the control did not fail.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.chaos.bench import SPAWNED_EVERY, Bench, Row, call
from benchmarks.chaos.breakages import BREAKAGES
from benchmarks.chaos.control import control_rows
from benchmarks.chaos.corruptions import corruption_rows
from benchmarks.chaos.foreign import foreign_rows
from benchmarks.chaos.full_disk import full_disk_rows
from benchmarks.chaos.fuzzing import fuzz_rows
from benchmarks.chaos.kills import crash_rows, kill_rows
from benchmarks.chaos.pages import page_rows
from benchmarks.chaos.signals import signal_rows
from benchmarks.processes import RESULTS
from qlora_dpo.environment import describe

MOST_FAILURES = 10  # of a row that are written out
STARTED = {
    "spawned": "as a command, which one trial in ten is,",
    "forked": "forked from a process that has imported the libraries",
}


@dataclass(frozen=True)
class Counts:
    """How often each promise is tried."""

    kills: int = 50
    signals: int = 100
    crash_points: int | None = None
    """Of each of the two runs; all of them by default."""
    corruptions: int = 200
    corrupted_runs: int = 6
    full_disks: int = 15
    fuzzed: int = 10_000
    attacks: int | None = None
    """On the pages; all of them by default."""
    controls: int = 8


RESULT = "chaos.json"
REDUCED = Counts(
    kills=2,
    signals=3,
    crash_points=1,
    corruptions=40,
    corrupted_runs=1,
    full_disks=1,
    fuzzed=300,
    attacks=20,
    controls=2,
)
ROWS: dict[str, Callable[[Bench, Counts], list[Row]]] = {
    "kill": lambda bench, counts: kill_rows(bench, counts.kills),
    "crash_points": lambda bench, counts: crash_rows(bench, counts.crash_points),
    "corruption": lambda bench, counts: corruption_rows(bench, counts.corruptions, counts.corrupted_runs),
    "signals": lambda bench, counts: signal_rows(bench, counts.signals),
    "full_disk": lambda bench, counts: full_disk_rows(bench, counts.full_disks),
    "fuzz": lambda bench, counts: fuzz_rows(bench, counts.fuzzed),
    "pages": lambda bench, counts: page_rows(bench, counts.attacks),
    "foreign": lambda bench, counts: foreign_rows(bench),
    "control": lambda bench, counts: control_rows(bench, counts.controls),
}


WITHOUT_RUNS = {"fuzz", "pages", "foreign"}


def main(argv: list[str] | None = None) -> int:
    """Run the rows, print the table, write it; returns the exit code."""
    options = parse_arguments(argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # one order of additions, and runs that do not wait for each other
    started = time.perf_counter()
    results: dict[str, Any] = {"seed": options.seed, "counts": asdict(options.counts), "broken": options.breakage}
    say(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as folder:
        results["environment"] = call(describe)
        bench = Bench.make(Path(folder), options.seed, options.breakage)
        results["run_seconds"] = {}
        if set(options.only) - WITHOUT_RUNS:
            spawned = max(options.counts.kills, options.counts.signals) >= SPAWNED_EVERY and not options.breakage
            bench.measure(spawned)
            results["run_seconds"] = bench.seconds
            say("an unbroken run takes " + ", ".join(f"{took:.1f} s {kind}" for kind, took in bench.seconds.items()))
        rows = [row for name in options.only for row in run_row(name, bench, options.counts)]
    results["rows"] = [asdict(row) | {"verdict": row.verdict} for row in rows]
    results["seconds"] = time.perf_counter() - started
    if options.output and options.only != list(ROWS):
        results = completed(results, options.output / RESULT)
    print(table(results))
    if options.output:
        write(options.output, results)
    return int(any(row.verdict == "FAILED" for row in rows))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options, with the counts that they amount to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--chaos", type=int, metavar="N", help="kills, half as many as signals; with --reduced crash points too"
    )
    parser.add_argument("--reduced", action="store_true", help="a few of each")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--break", dest="breakage", choices=BREAKAGES, help="break the tool: the rows must fail")
    parser.add_argument("--output", type=Path, help="folder of the results; default benchmarks/results for a whole run")
    options = parser.parse_args(argv)
    options.counts = REDUCED if options.reduced else Counts()
    if options.chaos is not None:
        points = options.counts.crash_points and options.chaos
        options.counts = replace(options.counts, kills=options.chaos, signals=2 * options.chaos, crash_points=points)
    is_whole = not (options.reduced or options.only or options.breakage) and options.counts.kills >= Counts.kills
    if options.output is None and is_whole:
        options.output = RESULTS
    options.only = options.only or list(ROWS)
    return options


def run_row(name: str, bench: Bench, counts: Counts) -> list[Row]:
    """Run one entry of the table of rows; a run that hangs fails it."""
    started = time.perf_counter()
    print(f"{name} ", end="", file=sys.stderr, flush=True)
    try:
        rows = ROWS[name](bench, counts)
    except TimeoutError as error:
        rows = [Row(name, "A run ends.", trials=1, failures=[str(error)])]
    rows[0].seconds = time.perf_counter() - started
    verdicts = ", ".join(f"{row.name}: {row.passed} of {row.trials} {row.verdict}" for row in rows)
    say(f" {rows[0].seconds:.0f} s; {verdicts}")
    for failure in [failure for row in rows if row.verdict == "FAILED" for failure in row.failures[:MOST_FAILURES]]:
        say(f"  {failure}")
    return rows


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def completed(results: dict[str, Any], file: Path) -> dict[str, Any]:
    """The results with those rows of an earlier run like it that were not run again, where there is one."""
    earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if any(earlier.get(name) != results[name] for name in ("seed", "counts", "broken", "environment")):
        return results
    new = {row["name"]: row for row in results["rows"]}
    seconds = earlier["seconds"] + results["seconds"]
    rows = [new.pop(row["name"], row) for row in earlier["rows"]]
    return earlier | {"rows": [*rows, *new.values()], "seconds": seconds}


def write(folder: Path, results: dict[str, Any]) -> None:
    """The results as JSON and as a table beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in results["rows"]:
        row["failures"] = row["failures"][:MOST_FAILURES]
    (folder / RESULT).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "chaos.md").write_text(table(results), encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """One line for each promise."""
    machine = results["environment"]
    took = "; ".join(f"{STARTED[kind]} {seconds:.1f} s" for kind, seconds in results["run_seconds"].items())
    lines = [
        "# Chaos",
        "",
        f"{machine['processor']}, {machine['cores']} cores. Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, bitsandbytes {machine['bitsandbytes']}. Seed {results['seed']}, "
        f"{results['seconds'] / 60:.0f} minutes in all.",
        "",
        "A LLaMA of one layer in NF4, LoRA with dropout, accumulation over two micro-batches, two epochs of 6 "
        "steps, a checkpoint every 3, an evaluation every 4.",
        "",
        *([f"An unbroken run: {took}.", ""] if took else []),
        *([f"**The tool was broken on purpose: {results['broken']}.**", ""] if results["broken"] else []),
        "| row | promise | kept | verdict | worst |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        kept = f"{row['trials'] - row['passed']} failed" if row["needs_failures"] else str(row["passed"])
        worst = row["impossible"] or row["worst"]
        lines.append(f"| {row['name']} | {row['promise']} | {kept} of {row['trials']} | {row['verdict']} | {worst} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
