"""One table for each thing that is measured; a row without a measurement says why."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.kernels import GAPS, GROUPS
from benchmarks.gpu.rows import NEEDS_CUDA, NOT_MEASURED, Row

Values = dict[str, Any]
Rows = Mapping[tuple[str, str], Row]


@dataclass(frozen=True)
class Table:
    """Title, what a reader must know, headers, and the cells of a measured row; `rows` may hold others to compare."""

    name: str
    title: str
    intro: str
    headers: tuple[str, ...]
    cells: Callable[[str, Values, Rows], Sequence[str]]


def lines_of(table: Table, names: Sequence[str], rows: Rows) -> list[str]:
    """The table in Markdown with a line for each of these names."""
    lines = [f"## {table.title}", "", table.intro, "", *head(table.headers)]
    for name in names:
        row = rows.get((table.name, name))
        if row is None or not row.values:
            cells: Sequence[str] = [(row.note if row else "") or NOT_MEASURED]
        else:
            cells = table.cells(name, row.values, rows)
        cells = [cell.replace("|", "/") if cell != name else cell for cell in cells]
        blanks = [""] * (len(table.headers) - 1 - len(cells))
        lines.append(f"| {' | '.join([name.replace('|', chr(92) + '|'), *cells, *blanks])} |")
    return [*lines, ""]


def head(headers: Sequence[str]) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(headers)} |", "|---" * len(headers) + "|"]


def median(values: Values) -> float:
    """Seconds of a step."""
    return statistics.median(values["seconds"])


def spread(values: Values) -> str:
    """Seconds of a step with the least and the most."""
    return f"{median(values):.2f} ({min(values['seconds']):.2f} to {max(values['seconds']):.2f})"


def check_cells(_name: str, values: Values, _rows: Rows) -> list[str]:
    """A check."""
    return ["passed" if values["passed"] else "**FAILED**", values["found"], values["limit"], values["how"]]


def speed_cells(name: str, values: Values, rows: Rows) -> list[str]:
    """A program's speed; ours beside TRL's fastest form in the same situation."""
    reference = values.get("reference_seconds")
    cells = [
        spread(values), f"{values['pairs_per_second']:.2f}", f"{values['tokens_per_second']:,.0f}",
        f"{values['peak_gib']:.1f}", "" if reference is None else f"{reference:.2f}",
    ]  # fmt: skip
    model, _, program = name.partition(": ")
    if not program.startswith("ours"):
        return cells
    factor = times_trl(model, values, rows, first_epoch="first epoch" in program)
    return [*cells, NOT_MEASURED if factor is None else f"{factor:.2f} x"]


def best_trl(model: str, rows: Rows, *, first_epoch: bool) -> tuple[str, float] | None:
    """TRL's fastest form on this model, and its seconds per step; in a first epoch with its reference's share."""
    found = {}
    for (table, name), row in rows.items():
        if table == "speed" and name.startswith(f"{model}: TRL") and row.values:
            share = row.values["reference_seconds"] if first_epoch else 0.0
            found[name.partition(": ")[2]] = median(row.values) + share
    return min(found.items(), key=lambda item: item[1]) if found else None


def times_trl(model: str, values: Values, rows: Rows, *, first_epoch: bool) -> float | None:
    """How many times TRL's pairs per second."""
    best = best_trl(model, rows, first_epoch=first_epoch)
    return None if best is None else best[1] / median(values)


def lever_cells(name: str, values: Values, rows: Rows) -> list[str]:
    """A lever beside all of them together."""
    whole = rows.get(("speed", f"{name.partition(': ')[0]}: ours, reference known"))
    factor = f"{median(values) / median(whole.values):.2f} x" if whole and whole.values else ""
    return [
        spread(values), factor, f"{values['tokens_per_second']:,.0f}", f"{values['peak_gib']:.1f}",
        f"{values['max_tokens']}, {values['levels']}",
    ]  # fmt: skip


def memory_cells(_name: str, values: Values, _rows: Rows) -> list[str]:
    """The plan beside what was held."""
    cells = [str(values["tokens"]), values["levels"], f"{values['planned_gib']:.2f}"]
    if "held_gib" not in values:
        return [*cells, values.get("held", NEEDS_CUDA)]
    process = f"{values['planned_process_gib']:.2f} / {values['context_gib']:.2f}"
    return [*cells, f"{values['held_gib']:.2f}", f"{values['error_percent']:+.1f} %", process]


def cap_cells(_name: str, values: Values, _rows: Rows) -> list[str]:
    """A run under a cap."""
    return [
        f"{values['cap_gib']:.2f}", f"{values['used_gib']:.2f}", "yes" if values["fits"] else "**NO**",
        f"{values['planned_gib']:.2f}", f"{median(values):.2f}", f"{values['max_tokens']}, {values['levels']}",
    ]  # fmt: skip


def model_cells(_name: str, values: Values, _rows: Rows) -> list[str]:
    """A base that was built."""
    held = values["held_gib"]
    return [f"{values['seconds']:.1f}", NEEDS_CUDA if held is None else f"{held:.2f}", f"{values['peak_gib']:.2f}"]


def ceiling_cells(_name: str, values: Values, _rows: Rows) -> list[str]:
    """A rate."""
    return [f"{values['rate']:,.1f} {values['unit']}"]


def split_lines(models: Sequence[str], rows: Rows) -> list[str]:
    """A line per group of kernels, a column per model."""
    found = {model: rows[key].values if (key := ("split", model)) in rows else {} for model in models}
    notes = [rows[key].note if (key := ("split", model)) in rows else "" for model in models]
    lines = [
        "## Where a step's time goes", "",
        "torch's profiler over one step with all levers, the reference known. A product with the vocabulary in its "
        "shapes is the head's, one with the rank LoRA's. Seconds and share of the step; on a GPU the gaps are what the "
        "same step takes beyond its kernels without the profiler.",
        "", *head(["", *models]),
    ]  # fmt: skip
    for group in (*GROUPS, GAPS):
        lines.append(f"| {group} | {' | '.join(_share(found[model], group) for model in models)} |")
    steps = [
        f"{values['step_seconds']:.2f} s" if values else note or NOT_MEASURED
        for values, note in zip(found.values(), notes, strict=True)
    ]
    lines += [f"| the step without the profiler | {' | '.join(steps)} |", ""]
    for model, values in found.items():
        dearest = values.get("dearest_of_the_rest", [])
        lines += (
            [f"{model}, the dearest of the rest: " + "; ".join(f"`{n}` {s:.3f} s" for n, s in dearest[:6]), ""]
            if dearest
            else []
        )
    return lines


def _share(values: Values, group: str) -> str:
    if not values:
        return NOT_MEASURED
    seconds = values["groups"][group]
    return f"{seconds:.3f} s, {seconds / values['wall_seconds']:.0%}"


TABLES = (
    Table("checks", "Checks on the device", "Each compares with something computed another way.",
          ("check", "result", "found", "allowed", "how"), check_cells),
    Table("speed", "Speed against TRL", "One step is 16 pairs of the seed's lengths at r=256. tokens/s count a prompt "
          "twice and no padding, for every program. *reference* is the share of one step in the pass over the "
          "reference. TRL: its fastest form of those measured; with the reference known both bear no reference, in a "
          "first epoch both do. peak GiB is torch's; the optimizer's paged state is beside it, the same for "
          "every program.",
          ("program", "s/step (spread)", "pairs/s", "tokens/s", "peak GiB", "reference, s/step", "against TRL"),
          speed_cells),
    Table("levers", "Levers", "Each left out of all, and each alone; *of all levers* is the time against all levers "
          "together. `no lever` is one pair at a time in padded rows, PEFT's and transformers' own layers, all logits, "
          "full checkpointing, the reference inline.",
          ("form", "s/step (spread)", "of all levers", "tokens/s", "peak GiB", "tokens at once, checkpointing"),
          lever_cells),
    Table("memory", "The plan's memory against what was held", "GiB without the plan's reserve; held is torch's peak "
          "and the optimizer's paged state. Context and libraries beside: planned and measured.",
          ("case", "tokens", "checkpointing", "planned", "held", "error", "process: planned / measured"), memory_cells),
    Table("caps", "Small cards, by a hard cap", "The process could not have taken more: torch's allocator was capped "
          "so that it, CUDA's context and the optimizer's paged state stay within the card's size (10^9 bytes a GB). "
          "*used* is the whole card as the driver counts it, at most.",
          ("case", "cap, GiB", "used, GiB", "fits", "planned, GiB", "s/step", "tokens at once, checkpointing"),
          cap_cells),
    Table("models", "The models", "Random weights, quantized one layer at a time on the device, every weight a window "
          "of one random block; peak while it was built.",
          ("shape", "seconds", "GiB", "peak GiB"), model_cells),
    Table("ceilings", "What this card reaches", "Medians of five tries on random values.", ("", "rate"), ceiling_cells),
)  # fmt: skip
