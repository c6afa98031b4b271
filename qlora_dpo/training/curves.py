"""Draws training_curves.png from metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from qlora_dpo.training.tracking import read_metrics

# (title, series, horizontal line with its label)
PANELS: tuple[tuple[str, tuple[str, ...], tuple[float, str] | None], ...] = (
    ("Loss", ("loss", "eval_loss"), (math.log(2), "ln 2")),
    ("Reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies"), (0.5, "chance")),
    ("Reward margin", ("rewards/margins", "eval_rewards/margins"), (0.0, "")),
    ("Rewards", ("rewards/chosen", "rewards/rejected"), (0.0, "")),
    ("Gradient norm", ("grad_norm",), None),
    ("Learning rate", ("learning_rate",), None),
)


def draw_curves(metrics_file: Path, output: Path) -> None:
    """Write a PNG with loss, rewards, accuracy, gradient norm and learning rate over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_file)
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names, line) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for name in names:
            _draw_series(axes, rows, name)
        if line:
            axes.axhline(line[0], color="0.6", linewidth=1, linestyle="--", label=line[1] or None)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(output, dpi=110, format="png")


def _draw_series(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        marker = "o" if name.startswith("eval_") or len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4)
