"""Training speed and memory against TRL's DPOTrainer: same pairs, same order, same LoRA start, alternating rounds.

python benchmarks/vs_trl.py --workload multi_turn --search     finds TRL's best form: results/trl_forms_WORKLOAD
python benchmarks/vs_trl.py --workload multi_turn [--lean]     compares with it: results/vs_trl_WORKLOAD

Each run is a process of its own; its first step warms up and is not counted. With the reference known, as from a store
or in a second epoch, ours is compared with TRL's fastest step; in a first epoch, with TRL's fastest step that includes
the reference's share. `--lean` adds full activation checkpointing, both ways.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import RESULTS, run
from benchmarks.programs import RANK, Run, Task, machine_line, pairs_line, prepare
from benchmarks.run_ours import OurForm, run_ours
from benchmarks.run_trl import TrlForm, run_trl
from benchmarks.trl_forms import FORMS, forms_table, parse_form, read_best_forms, search
from benchmarks.workloads import WORKLOADS


@dataclass(frozen=True)
class Row:
    """A line of the table: how a program's runs are read, and the line that it is compared with."""

    name: str
    program: TrlForm | OurForm
    counts_reference: bool = False
    """A step bears its share of the reference's pass before the first step."""
    against: str | None = None


def main() -> None:
    """Search or measure one workload; print and write the table."""
    options = parse_arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    forms_file = options.output / f"trl_forms_{options.workload}.json"
    with tempfile.TemporaryDirectory() as folder:
        if options.search:
            few = options.search_pairs or min(8, WORKLOADS[options.workload].pairs_per_step)
            task, results = prepared(options, folder, pairs_per_step=few, steps=1, warm_up=0)
            search(task, FORMS, lambda rows: write(forms_file, results | {"forms": rows}, forms_table))
            print(forms_table(results | json.loads(forms_file.read_text())))
            return
        best = (options.trl_form,) * 2 if options.trl_form else read_best_forms(forms_file)
        pairs_per_step = options.pairs_per_step or WORKLOADS[options.workload].pairs_per_step
        task, results = prepared(
            options, folder, pairs_per_step=pairs_per_step, steps=options.steps, warm_up=options.warm_up
        )
        rows = make_rows(*best, max_tokens=options.max_tokens, lean=options.lean)
        results |= {"rounds": options.rounds, "max_tokens": options.max_tokens}
        file = options.output / f"vs_trl_{options.workload}.json"
        measure(task, rows, results, lambda: write(file, results, table))
        print(table(results))


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="multi_turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a run")
    parser.add_argument("--warm_up", type=int, default=1, help="steps before them")
    parser.add_argument("--pairs_per_step", type=int, help="default: the workload's")
    parser.add_argument("--max_tokens", type=int, default=2048, help="tokens of a micro-batch of ours")
    parser.add_argument("--lean", action="store_true", help="add full activation checkpointing, both ways")
    parser.add_argument("--trl_form", type=parse_form, help="batch=1,precompute=false,checkpointing=false")
    parser.add_argument("--search", action="store_true", help="try every form of TRL and store the best")
    parser.add_argument("--search_pairs", type=int, help="pairs of a form's only step, a multiple of 4; default 8 or 4")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if (options.search_pairs or 0) % 4:
        parser.error(f"--search_pairs {options.search_pairs} is not a multiple of 4, the largest batch tried")
    return options


def prepared(options: argparse.Namespace, folder: str, **steps: int) -> tuple[Task, dict[str, Any]]:
    """The task, its files made in `folder`, and the head of the results."""
    task = Task(f"{folder}/model", f"{folder}/pairs.json", **steps)
    head = run(prepare, options.workload, task)
    return task, head | {"task": asdict(task) | {"model": "model", "pairs": "pairs.json"}}


def make_rows(steady: TrlForm, first: TrlForm, *, max_tokens: int, lean: bool) -> list[Row]:
    """The lines of the table, each program of ours after TRL's that it is compared with."""
    known, inline = Row(str(steady), steady), Row(str(first), first)
    if first.precompute:
        inline = Row(f"{inline.name}, that pass counted in", first, counts_reference=True)
    rows = []
    for baseline, form in ((known, OurForm(max_tokens=max_tokens)), (inline, OurForm(False, max_tokens=max_tokens))):
        rows += [] if baseline in rows else [baseline]
        rows.append(Row(str(form), form, against=baseline.name))
    if lean:
        least = TrlForm(batch=1, precompute=True, checkpointing=True)
        ours = OurForm(checkpointing="full", max_tokens=max_tokens)
        rows += [Row(str(least), least)] if least != steady else []
        rows.append(Row(str(ours), ours, against=str(least)))
    return rows


def measure(task: Task, rows: list[Row], results: dict[str, Any], note: Callable[[], None]) -> None:
    """Run every program in every round, then ours in its plainest form once for its losses; `note` after each round."""
    programs = list(dict.fromkeys(row.program for row in rows))
    results["rows"] = [asdict(row) | {"program": str(row.program)} for row in rows]
    runs: dict[str, list[dict[str, Any]]] = {str(program): [] for program in programs}
    results["runs"] = runs
    for number in range(results["rounds"]):
        for program in programs:
            found = run_program(task, program)
            runs[str(program)].append(asdict(found))
            summary = f"{statistics.median(found.seconds):.2f} s/step, {found.peak_gib:.2f} GiB"
            print(f"round {number + 1}: {program}: {summary}", file=sys.stderr, flush=True)
        note()
    plain = OurForm(reference_known=False, plain=True, max_tokens=1)
    results["plain"] = asdict(run_program(task, plain)) | {"form": str(plain)}
    note()


def run_program(task: Task, program: TrlForm | OurForm) -> Run:
    """One run in a fresh process."""
    return run(run_trl, task, program) if isinstance(program, TrlForm) else run(run_ours, task, program)


def write(file: Path, results: dict[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    """The results as JSON and as a table beside it."""
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(render(results), encoding="utf-8")


def read_row(row: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every counted step of the row's runs, their median, and the peak."""
    task, runs = Task(**results["task"]), results["runs"][row["program"]]
    share = [run["reference_seconds"] / task.all_steps if row["counts_reference"] else 0.0 for run in runs]
    seconds = [second + extra for run, extra in zip(runs, share, strict=True) for second in run["seconds"]]
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "peak_gib": max(run["peak_gib"] for run in runs),
    }


def table(results: dict[str, Any]) -> str:
    """Medians over the counted steps of all rounds, their spread, and the ratios to TRL."""
    pairs, tokens = results["task"]["pairs_per_step"], results["unshared_tokens_per_pair"]
    lines = [*heading(results), ""]
    lines += ["| program | s/step (spread) | pairs/s | tokens/s | speed | peak memory | memory |", "|---" * 7 + "|"]
    readings = {row["name"]: read_row(row, results) for row in results["rows"]}
    letters = dict(zip(readings, "ABCDEFGH", strict=False))
    for row in results["rows"]:
        reading = readings[row["name"]]
        speed = memory = ""
        if row["against"] is not None:
            baseline, letter = readings[row["against"]], letters[row["against"]]
            speed = f"{baseline['median'] / reading['median']:.2f} x {letter}"
            memory = f"{reading['peak_gib'] / baseline['peak_gib']:.2f} x {letter}"
        spread = f"{min(reading['seconds']):.2f} to {max(reading['seconds']):.2f}"
        rate, name = pairs / reading["median"], f"{letters[row['name']]}. {row['name']}"
        lines.append(
            f"| {name} | {reading['median']:.2f} ({spread}) | {rate:.2f} | {rate * tokens:.0f} "
            f"| {speed} | {reading['peak_gib']:.2f} GiB | {memory} |"
        )
    return "\n".join([*lines, "", *notes(results), ""])


def heading(results: dict[str, Any]) -> list[str]:
    """What was measured, on what."""
    shape, task = results["shape"], results["task"]
    size = f"{shape['hidden_size']} wide, {shape['num_hidden_layers']} layers, vocabulary {results['vocabulary']:,}"
    return [
        f"# Against TRL: {results['workload']}",
        "",
        machine_line(results["environment"]),
        f"LLaMA shape of {results['parameters'] / 1e6:.0f} M ({size}), NF4 with double quantization, bf16, r={RANK} "
        f"on all linear layers. {task['pairs_per_step']} pairs a step: {pairs_line(results)}.",
    ]


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know to trust the table, and how far the losses agree."""
    runs, task = results["runs"], Task(**results["task"])
    ours = [run["losses"] for name, found in runs.items() if name.startswith("ours") for run in found]
    trl = [run["losses"] for name, found in runs.items() if not name.startswith("ours") for run in found]
    loads = [run["load_average"] for found in runs.values() for run in found]
    counted = f"{len(next(iter(runs.values())))} rounds of {task.steps} counted steps"
    few = " (a step of 16 takes TRL many minutes here)" if results["workload"] == "long_prompt" else ""
    passes = {name: found[0]["reference_seconds"] for name, found in runs.items() if found[0]["reference_seconds"]}
    lines = [
        f"Medians over {counted}{few}; speed and memory are against the line of that letter. tokens/s count the "
        "prompt twice and no padding, for every program. Ours: micro-batches of at most "
        f"{results['max_tokens']} tokens, no activation checkpointing unless named.",
        "",
        f"The reference's pass over all {task.all_steps * task.pairs_per_step} pairs before the first step: "
        + "; ".join(f"{name}: {seconds:.1f} s" for name, seconds in passes.items())
        + ".",
        "",
        f"Largest difference of a step's loss between ours and TRL: {largest_difference(ours, trl):.1e} "
        "(ours trains the adapter in fp32, TRL in bf16).",
    ]
    if "plain" in results:
        floor = largest_difference(ours, [results["plain"]["losses"]])
        lines[-1] += f" Between ours and ours with PEFT's own forward on padded rows, one pair at a time: {floor:.1e}."
    return [*lines, "", f"Load average of the machine meanwhile: at most {max(loads):.1f}."]


def largest_difference(some: list[list[float]], others: list[list[float]]) -> float:
    """Between the losses of any step of any two runs."""
    return max(abs(a - b) for one in some for other in others for a, b in zip(one, other, strict=True))


if __name__ == "__main__":
    main()
