"""How a step's time and memory grow with the pairs, their length, the vocabulary, the rank and the answers' share.

python benchmarks/scaling.py        writes benchmarks/results/scaling.{json,md} and docs/images/scaling.png

One factor at a time is varied from `BASE`, with a small LLaMA shape, each point in a process of its own. A straight
line of seconds against tokens shows whether the cost per token stays the same.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import RESULTS, ROOT, run
from benchmarks.programs import TINY_SHAPE, Shape, Task, environment, machine_line, make_model
from benchmarks.run_ours import OurForm, run_ours
from benchmarks.workloads import Lengths, random_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHAPE: Shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
LEVELS: tuple[Literal["none", "selective"], ...] = ("none", "selective")
STEPS, MAX_TOKENS = 2, 2048


@dataclass(frozen=True)
class Point:
    """What a step consists of."""

    pairs: int = 4
    tokens: int = 256
    """Of a pair: its prompt once and both answers."""
    vocabulary: int = 32_000
    rank: int = 64
    share: float = 0.5
    """Of the tokens that are the answers', half each."""

    def lengths(self) -> Lengths:
        """Tokens of prompt, chosen and rejected."""
        answer = max(2, round(self.tokens * self.share / 2))
        return self.tokens - 2 * answer, answer, answer


BASE = Point()
# (factor, its values, title of its panel)
FACTORS: tuple[tuple[str, tuple[float, ...], str], ...] = (
    ("pairs", (4, 8, 16, 32), "pairs per step"),
    ("tokens", (128, 256, 512, 1024, 2048), "tokens per pair"),
    ("vocabulary", (8_000, 32_000, 152_000), "vocabulary"),
    ("rank", (8, 16, 64, 256), "LoRA rank"),
    ("share", (0.1, 0.25, 0.5, 0.75, 0.9), "answers' share of the tokens"),
)
TINY_BASE = Point(pairs=2, tokens=32, vocabulary=256, rank=8)
TINY_VALUES = {"pairs": (2, 4), "tokens": (32, 64), "vocabulary": (256,), "rank": (8,), "share": (0.5,)}
LINEAR = ("pairs", "tokens")  # the factors that change how many tokens a step has


def main() -> None:
    """Measure every point, print and write the table and the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few small points, for tests; needs --output")
    parser.add_argument("--output", type=Path, help="folder of all results, instead of the repository's own")
    options = parser.parse_args()
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output: its numbers are not to replace the measured ones")
    results = measure(options.tiny)
    folder, images = options.output or RESULTS, options.output or ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "scaling.md").write_text(table(results), encoding="utf-8")
    draw(results, images / "scaling.png")
    print(table(results))


def measure(tiny: bool) -> dict[str, Any]:
    """Run every point once at each level of activation checkpointing."""
    base, shape = (TINY_BASE, TINY_SHAPE) if tiny else (BASE, SHAPE)
    factors = [(name, TINY_VALUES[name] if tiny else values) for name, values, _ in FACTORS]
    along: dict[str, list[Point]] = {name: [varied(base, name, value) for value in values] for name, values in factors}
    points = list(dict.fromkeys(point for sweep in along.values() for point in sweep))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in {point.vocabulary for point in points}:
            run(make_model, f"{folder}/{vocabulary}", shape, vocabulary)
        for point in points:
            row: dict[str, Any] = {"point": asdict(point), "step_tokens": point.pairs * sum(point.lengths())}
            row |= {level: measure_point(point, level, folder) for level in LEVELS}
            rows.append(row)
            print(f"{point}: {row}", file=sys.stderr, flush=True)
    sweeps = {name: [rows[points.index(point)] for point in sweep] for name, sweep in along.items()}
    return {
        "environment": run(environment),
        "shape": shape,
        "base": asdict(base),
        "max_tokens": MAX_TOKENS,
        "load_average": os.getloadavg()[0],
        "sweeps": sweeps,
        "lines": {name: {level: straight_line(sweeps[name], level) for level in LEVELS} for name in LINEAR},
    }


def varied(base: Point, factor: str, value: float) -> Point:
    """The base with one factor changed."""
    change: dict[str, Any] = {factor: value}
    return replace(base, **change)


def measure_point(point: Point, level: Literal["none", "selective"], folder: str) -> dict[str, float]:
    """Median seconds of a step with the reference known, and the peak of the process."""
    task = Task(f"{folder}/{point.vocabulary}", f"{folder}/pairs.json", point.pairs, STEPS, rank=point.rank)
    rows = random_rows([point.lengths()] * (task.all_steps * point.pairs), point.vocabulary)
    Path(task.pairs).write_text(json.dumps(rows))
    found = run(run_ours, task, OurForm(checkpointing=level, max_tokens=MAX_TOKENS))
    return {"seconds": statistics.median(found.seconds), "peak_gib": found.peak_gib, "loaded_gib": found.loaded_gib}


def straight_line(rows: list[dict[str, Any]], level: str) -> dict[str, float]:
    """Least squares of seconds against tokens; `ratio` is the largest point's seconds per token over the smallest's."""
    import numpy as np

    tokens: NDArray[np.float64] = np.array([row["step_tokens"] for row in rows], dtype=float)
    seconds: NDArray[np.float64] = np.array([row[level]["seconds"] for row in rows])
    slope, intercept = np.polyfit(tokens, seconds, 1)
    residual = ((seconds - slope * tokens - intercept) ** 2).sum()
    spread = ((seconds - seconds.mean()) ** 2).sum()
    return {
        "seconds_per_1000_tokens": float(1000 * slope),
        "intercept": float(intercept),
        "r_squared": float(1 - residual / spread) if spread else 1.0,
        "ratio": float((seconds[-1] / tokens[-1]) / (seconds[0] / tokens[0])),
    }


def table(results: dict[str, Any]) -> str:
    """Every point, and the straight lines."""
    shape, base = results["shape"], results["base"]
    lines = [
        "# Scaling",
        "",
        machine_line(results["environment"]),
        f"LLaMA shape ({shape['hidden_size']} wide, {shape['num_hidden_layers']} layers), NF4, bf16, reference known. "
        f"One factor at a time from {base['pairs']} pairs of {base['tokens']} tokens (prompt once, both answers), "
        f"vocabulary {base['vocabulary']:,}, r={base['rank']}, half of the tokens answers'; micro-batches of at most "
        f"{results['max_tokens']} tokens. Activation checkpointing none and selective.",
        "",
        "| factor | value | tokens/step | none, s/step | none, peak | selective, s/step | selective, peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, _, title in FACTORS:
        for row in results["sweeps"][name]:
            cells = [f"{row[level]['seconds']:.2f} | {row[level]['peak_gib']:.2f} GiB" for level in LEVELS]
            lines.append(f"| {title} | {row['point'][name]:,} | {row['step_tokens']:,} | {' | '.join(cells)} |")
    lines += ["", "Seconds against tokens as a straight line; ratio: a token's cost at the largest point over that"]
    lines += ["at the smallest (1: linear)."]
    lines += ["", "| along | level | s per 1,000 tokens | R² | ratio |", "|---|---|---|---|---|"]
    for name, levels in results["lines"].items():
        for level, line in levels.items():
            cells = [f"{line[key]:.{digits}f}" for key, digits in _LINE_CELLS]
            lines.append(f"| {name} | {level} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Load average of the machine at the end: {results['load_average']:.1f}.", ""])


_LINE_CELLS = (("seconds_per_1000_tokens", 3), ("r_squared", 4), ("ratio", 2))


def draw(results: dict[str, Any], file: Path) -> None:
    """A panel per factor: seconds above, peak memory below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, len(FACTORS), sharex="col")
    for column, (name, _, title) in enumerate(FACTORS):
        rows = results["sweeps"][name]
        values = [row["point"][name] for row in rows]
        for axes, key in zip(panels[:, column], ("seconds", "peak_gib"), strict=True):
            for level, marker in zip(LEVELS, "os", strict=True):
                axes.plot(values, [row[level][key] for row in rows], marker=marker, markersize=4, label=level)
            axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
            axes.grid(alpha=0.2)
        panels[1, column].set_xlabel(title)
    panels[0, 0].set_ylabel("seconds per step")
    panels[1, 0].set_ylabel("peak memory, GiB")
    panels[0, 0].legend(fontsize=8, title="checkpointing", title_fontsize=8)
    figure.savefig(file, dpi=110, format="png")


if __name__ == "__main__":
    main()
