"""Everything that needs a real GPU, in one run without network: checks, speed against TRL, levers, memory.

python -m benchmarks.gpu                          at most 8 minutes: benchmarks/results/gpu.{json,md}
python -m benchmarks.gpu --continue               what an earlier run did not reach
python -m benchmarks.gpu --only memory caps       some parts
python -m benchmarks.gpu --tiny --output X        toy shapes, on a CPU too: X.json and X.md
python -m benchmarks.gpu --empty                  the tables without a number

Results are written after every row, so that a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.hardware import hardware
from benchmarks.gpu.jobs import make_jobs
from benchmarks.gpu.report import report
from benchmarks.gpu.rows import Row, merged
from benchmarks.gpu.running import only, run_all
from benchmarks.gpu.scale import SCALES, SEED
from benchmarks.processes import RESULTS

MINUTES = 8.0
SAME = ("gpus", "torch", "bitsandbytes", "transformers")
"""Of the hardware: rows of two runs in one table must agree in these."""


def main(argv: list[str] | None = None) -> int:
    """Measure, write after every row, print the tables; returns the exit code: 1 where anything failed."""
    options = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the measuring process is ended too
    scale = SCALES["tiny" if options.tiny else "real"]
    jobs = make_jobs(scale)
    results: dict[str, Any] = {"scale": scale.name, "seed": SEED, "minutes": options.minutes, "runs": []}
    earlier: list[Row] = []
    if not options.empty:
        machine = hardware() | {"load_before": list(os.getloadavg()), "command": " ".join(sys.argv[1:])}
        if options.resume:
            results, earlier = read_earlier(options.output, machine)
        if not options.tiny and not machine["gpus"]:
            raise SystemExit("nvidia-smi names no GPU here, and the real shapes need one: --tiny runs on a CPU.")
        results["runs"] = [*results["runs"], machine]
    rows = earlier

    def write(found: list[Row]) -> None:
        nonlocal rows
        rows = merged(earlier, found)
        results["rows"] = [asdict(row) for row in rows]
        if results["runs"]:
            results["runs"][-1]["load_after"] = list(os.getloadavg())
        write_results(options.output, results, report(results, rows, jobs))

    write([])
    if not options.empty:
        chosen = only(jobs, options.only or [job.part for job in jobs], earlier)
        run_all(chosen, 60 * options.minutes, write, together=options.tiny)
    print(report(results, rows, jobs))
    return int(any(row.is_bad for row in rows))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parts = list(dict.fromkeys(job.part for job in make_jobs(SCALES["real"])))
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of the whole run; default {MINUTES:g}")
    parser.add_argument("--only", nargs="+", choices=parts, metavar="PART", help=f"some of {', '.join(parts)}")
    parser.add_argument("--continue", dest="resume", action="store_true", help="measure what --output lacks")
    parser.add_argument("--tiny", action="store_true", help="toy shapes, on a CPU too; needs --output")
    parser.add_argument("--empty", action="store_true", help="write the tables without measuring; no GPU needed")
    parser.add_argument("--output", type=Path, help="results as OUTPUT.json and OUTPUT.md; default results/gpu")
    options = parser.parse_args(argv)
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output, so that it cannot replace real results")
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g} is no time to measure in")
    options.output = options.output or RESULTS / "gpu"
    if (options.empty or (options.only and not options.resume)) and has_measured(options.output):
        word, way_out = ("--empty", "") if options.empty else ("--only", ": add --continue, or name another --output")
        parser.error(f"{word} would replace the measured rows of {options.output}.json{way_out}")
    return options


def has_measured(output: Path) -> bool:
    """Whether there are results with a number in them."""
    file = output.with_name(output.name + ".json")
    return file.is_file() and any(row["values"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"])


def read_earlier(output: Path, machine: dict[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """The results of an earlier run on the same hardware and versions.

    Raises:
        SystemExit: they are of another machine, so that one table cannot hold both.
    """
    file = output.with_name(output.name + ".json")
    if not file.is_file():
        raise SystemExit(f"{file} is missing: there is nothing to continue.")
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for run in results["runs"]:
        differs = [
            f"{name} {run.get(name)} then, {machine.get(name)} now"
            for name in SAME
            if run.get(name) != machine.get(name)
        ]
        if differs:
            raise SystemExit(f"{file} was measured elsewhere ({'; '.join(differs)}): name another --output.")
    return results, [Row(**row) for row in results["rows"]]


def write_results(output: Path, results: dict[str, Any], text: str) -> None:
    """JSON and Markdown, each replaced as a whole."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(results, indent=1) + "\n"), (".md", text)):
        file = output.with_name(output.name + suffix)
        waiting = file.with_name(f".{file.name}.new")
        waiting.write_text(content, encoding="utf-8")
        waiting.replace(file)


if __name__ == "__main__":
    sys.exit(main())
