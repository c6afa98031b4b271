"""The results in Markdown: the headline, a table for each part, and rows for the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.jobs import Job
from benchmarks.gpu.lengths import seed_lengths
from benchmarks.gpu.rows import NOT_MEASURED, Row
from benchmarks.gpu.scale import SCALES, SEED_DISTINCT_PAIRS, SEED_PAIRS, SEED_RANK, SEED_SECONDS, SEED_STEPS
from benchmarks.gpu.tables import TABLES, Rows, best_trl, head, lines_of, median, split_lines, times_trl

MODEL = "33B"


def report(results: dict[str, Any], found: Sequence[Row], jobs: Sequence[Job]) -> str:
    """All tables; what no job has measured is named as such."""
    rows: Rows = {(row.table, row.name): row for row in found}
    names: dict[str, list[str]] = {}
    for job in jobs:
        for table, name in job.rows:
            names.setdefault(table, []).append(name)
    lines = ["# On a GPU", "", *machine_lines(results), "", *task_lines(results), "", *headline_lines(rows)]
    for table in TABLES:
        lines += lines_of(table, list(dict.fromkeys(names.get(table.name, []))), rows)
        if table.name == "levers":
            lines += split_lines(list(dict.fromkeys(names.get("split", []))), rows)
    return "\n".join([*lines, *readme_lines(rows)])


def machine_lines(results: dict[str, Any]) -> list[str]:
    """Hardware, versions and load of every run that these rows are of."""
    if not results["runs"]:
        return [f"Hardware: {NOT_MEASURED}. `python -m benchmarks.gpu` fills these tables."]
    lines = []
    for run in results["runs"]:
        versions = ", ".join(f"{name} {run[name] or 'not installed'}" for name in
                             ("torch", "transformers", "peft", "bitsandbytes", "trl"))  # fmt: skip
        card = f"{'; '.join(run['gpus'])}, driver {run['driver'][0]}" if run["gpus"] else "no GPU"
        load = f"load average {run['load_before'][0]:.1f} before, {run.get('load_after', [0.0])[0]:.1f} after"
        lines.append(f"{card}; {run['processor']}, {run['cores']} cores, {run['memory_gib']:g} GiB. {versions}, Python "
                     f"{run['python']}. Seed {results['seed']}; {load}.")  # fmt: skip
    return lines


def task_lines(results: dict[str, Any]) -> list[str]:
    """What is trained."""
    scale = SCALES[results["scale"]]
    lengths = seed_lengths(scale.shorter)
    means = [sum(column) / len(column) for column in zip(*lengths, strict=True)]
    words = f"prompt {means[0]:.0f}, chosen {means[1]:.0f}, rejected {means[2]:.0f}"
    tiny = "" if scale.name == "real" else " **Toy shapes: these numbers say nothing about real models.**"
    return [
        f"Models of the named shapes with random weights in NF4 with double quantization, bf16, LoRA r={scale.rank} on "
        f"all linear layers; {scale.pairs_per_step} pairs a step of random ids, with the lengths of the seed's data "
        f"cut as its script cuts them (mean tokens: {words}); 8-bit paged AdamW on a GPU for every program.{tiny}"
    ]


def headline(rows: Rows) -> dict[str, float] | None:
    """Seconds for the seed's run, estimated from the measured steps."""
    row = rows.get(("speed", f"{MODEL}: ours, reference known"))
    if row is None or not row.values:
        return None
    step, reference = median(row.values), row.values["reference_seconds"] / row.values["pairs_per_step"]
    return {
        "step": step,
        "steps": len(row.values["seconds"]),
        "known": SEED_STEPS * step,
        "first": SEED_STEPS * step + SEED_DISTINCT_PAIRS * reference,
        "preflight": row.values["preflight_seconds"],
        "peak_gib": row.values["peak_gib"],
    }


def headline_lines(rows: Rows) -> list[str]:
    """The seed's run in seconds, and how that number was made."""
    found = headline(rows)
    run = f"{SEED_STEPS} steps of {SEED_PAIRS} pairs, {MODEL}, r={SEED_RANK}"
    lines = ["## The seed's run", "", *head(["", "seconds", "of the seed's 5 hours"])]
    if found is None:
        return [*lines, f"| {run} | {NOT_MEASURED} | |", ""]
    for words, key in (
        ("the reference known", "known"),
        (f"{SEED_DISTINCT_PAIRS:,} distinct pairs scored once", "first"),
    ):
        lines.append(f"| {run}; {words} | {found[key]:,.0f} | 1/{SEED_SECONDS / found[key]:,.1f} |")
    return [
        *lines, "",
        f"An estimate: {SEED_STEPS} times the median of {found['steps']} measured steps ({found['step']:.2f} s), in "
        f"the second line {SEED_DISTINCT_PAIRS:,} times the measured seconds of a pair's reference. Loading is not in "
        f"it, nor is the preflight ({found['preflight']:.0f} s, once). The seed's 5 hours (2023, one 80 GB H100) hold "
        "ten evaluations, 30 sampled texts and ten checkpoints besides; its share for those is not known.", "",
    ]  # fmt: skip


def readme_lines(rows: Rows) -> list[str]:
    """Rows that can be copied into the README."""
    lines = ["## Rows for the README", "", *head(["on one GPU", "measured"])]
    found = headline(rows)
    seconds = NOT_MEASURED if found is None else (
        f"{found['known'] / 60:.1f} min, {found['first'] / 60:.1f} min with the reference's pass; estimated from "
        f"{found['steps']} steps; {found['peak_gib']:.0f} GiB")  # fmt: skip
    lines.append(f"| {MODEL}, {SEED_STEPS} steps of {SEED_PAIRS} pairs, r={SEED_RANK} (5 hours in 2023) | {seconds} |")
    for first_epoch, words in ((False, "reference known"), (True, "first epoch")):
        row = rows.get(("speed", f"{MODEL}: ours, {words}"))
        factor = times_trl(MODEL, row.values, rows, first_epoch=first_epoch) if row and row.values else None
        best = best_trl(MODEL, rows, first_epoch=first_epoch)
        cell = NOT_MEASURED if factor is None or best is None else f"{factor:.1f} times ({best[0]})"
        lines.append(f"| pairs/s against TRL, {MODEL}, {words} | {cell} |")
    for case in ("33B, r=16, 24 GB", "70B, r=16, 48 GB"):
        row = rows.get(("caps", case))
        cell = (row.note if row else "") or NOT_MEASURED
        if row and row.values:
            cell = f"{'fits' if row.values['fits'] else 'does NOT fit'}: {row.values['used_gib']:.1f} GiB used at most"
        lines.append(f"| {case} | {cell} |")
    errors = [abs(row.values["error_percent"]) for (table, _), row in rows.items()
              if table == "memory" and "error_percent" in row.values]  # fmt: skip
    cell = f"at most {max(errors):.1f} % in {len(errors)} cases" if errors else NOT_MEASURED
    return [*lines, f"| the plan's error in memory | {cell} |", ""]
