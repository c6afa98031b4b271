"""Draws training_curves.png from metrics.jsonl."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from qlora_dpo.files.atomic import save_picture
from qlora_dpo.training.by_category import logged_categories, shown_prefix
from qlora_dpo.training.records.tracking import read_metrics

# (title, series, horizontal line with its label)
Panel = tuple[str, tuple[str, ...], tuple[float, str] | None]
_OF_ALL: tuple[Panel, ...] = (("Gradient norm", ("grad_norm",), None), ("Learning rate", ("learning_rate",), None))
PANELS: dict[str, tuple[Panel, ...]] = {
    "dpo": (
        ("Loss", ("loss", "eval_loss"), (math.log(2), "ln 2")),
        ("Reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies"), (0.5, "chance")),
        ("Reward margin", ("rewards/margins", "eval_rewards/margins"), (0.0, "")),
        ("Rewards", ("rewards/chosen", "rewards/rejected"), (0.0, "")),
        *_OF_ALL,
    ),
    "sft": (
        ("Loss (NLL per token)", ("loss", "eval_loss"), None),
        ("Token accuracy", ("mean_token_accuracy", "eval_mean_token_accuracy"), None),
        ("Supervised tokens per step", ("supervised_tokens",), None),
        *_OF_ALL,
    ),
}
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei")


def draw_curves(metrics_file: Path, output: Path, objective: str = "dpo") -> None:
    """Write a PNG with what the objective logs, gradient norm and learning rate over the steps, and the loss of each
    category where there are categories."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_file)
    prefix = shown_prefix(rows)
    rows_of_panels = 2 if prefix is None else 3
    figure = Figure(figsize=(12, 3.25 * rows_of_panels))
    FigureCanvasAgg(figure)
    # Fixed places: a layout that is computed draws everything twice.
    edge = 0.3 / rows_of_panels
    grid = figure.add_gridspec(
        rows_of_panels, 3, left=0.06, right=0.985, wspace=0.22, bottom=edge, top=1 - edge / 2, hspace=0.4
    )
    for place, (title, names, line) in enumerate(PANELS[objective]):
        axes = figure.add_subplot(grid[place // 3, place % 3])
        for name in names:
            _draw_series(axes, rows, name)
        if line:
            axes.axhline(line[0], color="0.6", linewidth=1, linestyle="--", label=line[1] or None)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.2)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    if prefix is not None:
        _draw_categories(figure.add_subplot(grid[2, :2]), rows, prefix)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a category's name without a font for it
        save_picture(figure, output, dpi=110)


def _draw_categories(axes: Any, rows: list[dict[str, Any]], prefix: str) -> None:
    """The loss of every category, of the held-out pairs where there are some."""
    for number, category in enumerate(logged_categories(rows, prefix)):
        key = f"{prefix}loss/{category}"
        points = [(row["step"], row[key]) for row in rows if key in row]
        line = "-" if number < 10 else "--"  # there are ten colors
        axes.plot(*zip(*points, strict=True), line, label=category, marker="o" if prefix else ".", markersize=4)
    axes.set_title("Held-out loss by category" if prefix else "Loss by category")
    axes.set_xlabel("step")
    axes.grid(alpha=0.2)
    # In the empty third of the row, and without a say in how wide the panels are.
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), ncols=2, prop={"family": _fonts(), "size": 8})
    legend.set_in_layout(False)


def _fonts() -> list[str]:
    """The usual font and, for names of categories, one with Chinese characters where there is one."""
    from matplotlib.font_manager import fontManager

    there = fontManager.get_font_names()
    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in there][:1]]


def _draw_series(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        marker = "o" if name.startswith("eval_") or len(points) == 1 else None
        axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4)
