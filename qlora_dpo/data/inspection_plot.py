"""Draws what `data inspect` found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_dpo.data.inspection import PARTS
from qlora_dpo.files.atomic import save_picture

_SHOWN = 10


def draw_inspection(found: Mapping[str, Any], output: Path) -> None:
    """Write a PNG with lengths, turns and languages.

    Raises:
        OSError: the disk refuses.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (prompt, answers), (turns, languages) = figure.subplots(2, 2)
    _draw_lengths(prompt, found, PARTS[:1])
    _draw_lengths(answers, found, PARTS[1:])
    _draw_counts(turns, "Turns with the answer", found["turns"])
    _draw_counts(languages, f"Languages of {found['languages']['sampled']:,} answers", found["languages"]["answers"])
    title = f"{Path(found['source']).name}: {found['pairs']:,} pairs from {found['rows']:,} rows"
    figure.suptitle(title.encode("ascii", "replace").decode())  # matplotlib's font has few scripts
    save_picture(figure, output, dpi=110)


def _draw_lengths(axes: Any, found: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    edges = found["histogram"]["edges"]
    for part in parts:
        median = found["lengths"][part]["median"]
        axes.stairs(found["histogram"][part], edges, label=f"{part} (median {median:,.0f})", fill=len(parts) == 1)
    axes.set_title("Length of " + " and ".join(parts))
    axes.set_xlabel(found["unit"])
    axes.set_ylabel("pairs")
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8)


def _draw_counts(axes: Any, title: str, counts: Mapping[str, int]) -> None:
    shown = list(counts.items())[:_SHOWN]
    axes.bar([name for name, _ in shown], [count for _, count in shown], width=0.6)
    axes.set_xlim(-1, max(3, len(shown)))
    axes.set_title(title)
    axes.grid(alpha=0.2, axis="y")
