"""The curves of a run as PNG files, for a slide or a page that shows no HTML."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from eval.report.curves import charts
from eval.report.run import Run
from eval.report.svg import Chart, Line, is_logarithmic
from eval.report.words import Language, words_in
from qlora_dpo.files.atomic import PNG_MARK, save_picture
from qlora_dpo.files.guard import check_output, marked

COLORS = {1: "#2563c9", 2: "#d4572a", 3: "#0f7f6c", 4: "#a8327e"}


def draw_pictures(run: Run, folder: Path, language: Language = "en") -> list[Path]:
    """Write a PNG per chart; returns the files.

    Raises:
        OSError: the folder cannot be written.
        UsageError: it holds a picture of that name that this command did not draw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {folder / f"{name}.png": chart for name, chart in charts(run, words_in(language)).items()}
    for file in drawn:
        check_output(file, is_own=marked(PNG_MARK), option="png")
    for file, chart in drawn.items():
        _draw(chart, file)
    return list(drawn)


def _draw(chart: Chart, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for line in chart.lines:
        _draw_line(axes, line)
    if is_logarithmic(chart):
        axes.set_yscale("log")
    elif chart.level is not None:
        axes.axhline(chart.level[0], color="0.5", linewidth=1, linestyle="--", label=chart.level[1] or None)
    fonts = _fonts()
    axes.set_title(chart.title, family=fonts)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(prop={"family": fonts}, frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # no font with Chinese characters on this machine
        save_picture(figure, file, dpi=120)


def _draw_line(axes: Any, line: Line) -> None:
    points, color = line.series.finite, COLORS[line.color]
    steps = [point.step for point in points]
    if line.series.is_grouped and not line.is_held_out:
        axes.fill_between(
            steps,
            [point.low for point in points],
            [point.high for point in points],
            color=color,
            alpha=0.2,
            linewidth=0,
        )
    marker = "o" if line.is_held_out or len(points) == 1 else None
    axes.plot(steps, [point.mean for point in points], color=color, label=line.label, marker=marker, markersize=4)


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    from qlora_dpo.training.records.curves import CHINESE_FONTS  # imports torch

    there = fontManager.get_font_names()
    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in there][:1]]
