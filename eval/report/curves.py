"""Which metrics are drawn together, by objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.report.run import Run, number
from eval.report.series import Series, derived, scaled, series
from eval.report.svg import Chart, Line

LIMIT = -0.1  # nats per token: where `train` warns of displacement (qlora_dpo/training/displacement.py)
PER_TOKEN = ("displacement/chosen_per_token", "displacement/rejected_per_token")
AT_LN2 = {"sigmoid", "robust", "sigmoid_norm"}  # the losses that begin there

Words = Callable[..., str]


@dataclass(frozen=True)
class Panel:
    """A chart before anything is read: (metric, word, color) of each line; `eval_` metrics are dots."""

    name: str
    lines: tuple[tuple[str, str, int], ...]
    level: tuple[float, str] | None = None
    bounds: tuple[float | None, float | None] = (None, None)
    is_log: bool = False


def _both(key: str) -> tuple[tuple[str, str, int], ...]:
    return (key, "training", 1), (f"eval_{key}", "held_out", 3)


_SHARED = (
    Panel("grad_norm", (("grad_norm", "grad_norm", 1),), bounds=(0, None), is_log=True),
    Panel("learning_rate", (("learning_rate", "learning_rate", 1),), bounds=(0, None)),
    Panel("memory", (("memory/peak_gib", "memory_peak", 1),), bounds=(0, None)),
    Panel("speed", (("tokens_per_second", "tokens_per_second", 1),), bounds=(0, None)),
)
PANELS: dict[str, tuple[Panel, ...]] = {
    "dpo": (
        Panel("loss", _both("loss"), is_log=True),
        Panel(
            "rewards",
            (
                ("rewards/chosen", "chosen", 1),
                ("rewards/rejected", "rejected", 2),
                ("eval_rewards/chosen", "held_out", 1),
                ("eval_rewards/rejected", "held_out", 2),
            ),
            (0.0, ""),
        ),
        Panel("margins", _both("rewards/margins"), (0.0, "")),
        Panel("accuracies", _both("rewards/accuracies"), (0.5, "chance"), (0.0, 1.0)),
        Panel(
            "shift_per_token",
            (
                (PER_TOKEN[0], "chosen", 1),
                (PER_TOKEN[1], "rejected", 2),
                (f"eval_{PER_TOKEN[0]}", "held_out", 1),
                (f"eval_{PER_TOKEN[1]}", "held_out", 2),
            ),
            (LIMIT, "limit"),
            (None, 0.0),
        ),
        Panel("shift", (("shift/chosen", "chosen", 1), ("shift/rejected", "rejected", 2)), (0.0, "")),
        Panel(
            "lengths",
            (
                ("tokens_per_pair", "tokens_per_pair", 1),
                ("lengths/chosen", "chosen", 3),
                ("lengths/rejected", "rejected", 2),
            ),
            bounds=(0, None),
        ),
        *_SHARED,
    ),
    "sft": (
        Panel("nll", _both("loss"), is_log=True),
        Panel("token_accuracy", _both("mean_token_accuracy"), bounds=(None, 1.0)),
        Panel("supervised_tokens", (("supervised_tokens", "supervised_tokens", 1),), bounds=(0, None)),
        Panel("lengths", (("tokens_per_pair", "tokens_per_conversation", 1),), bounds=(0, None)),
        *_SHARED,
    ),
}


def charts(run: Run, words: Words) -> dict[str, Chart]:
    """The panels for which something was logged, by name."""
    found = _all_series(run)
    panels = [panel for panel in PANELS.get(run.objective, PANELS["dpo"]) if not _is_told_better(panel, found)]
    levels = _levels(run, words)
    drawn = {}
    for panel in panels:
        lines = tuple(
            Line(found[key], words(word), color, is_held_out=key.startswith("eval_"))
            for key, word, color in panel.lines
            if key in found
        )
        if lines:
            level = levels.get(panel.name) or (panel.level and (panel.level[0], words(panel.level[1])))
            drawn[panel.name] = Chart(words(f"{panel.name}_title"), lines, level, panel.bounds, panel.is_log)
    return drawn


def _is_told_better(panel: Panel, found: dict[str, Series]) -> bool:
    """The change of whole answers says no more than the rewards where there is that of each token."""
    return panel.name == "shift" and all(key in found for key in PER_TOKEN)


def _all_series(run: Run) -> dict[str, Series]:
    """Every metric that a panel may show, and what follows from others; only what has a number to draw."""
    rows = run.metrics
    keys = {key for panels in PANELS.values() for panel in panels for key, _, _ in panel.lines}
    found = {key: series(rows, key) for key in keys}
    beta = number(run.config.get("beta"))
    for name in ("chosen", "rejected"):
        found[f"shift/{name}"] = scaled(found[f"rewards/{name}"], 1 / beta if beta else math.nan, f"shift/{name}")
    unit = "conversations" if run.objective == "sft" else "pairs"
    found["tokens_per_pair"] = derived(rows, "tokens_per_second", f"{unit}_per_second", "tokens_per_pair")
    return {key: one for key, one in found.items() if one is not None and one.finite}


def _levels(run: Run, words: Words) -> dict[str, tuple[float, str]]:
    """The horizontal lines that depend on the settings."""
    levels = {}
    loss_type = run.config.get("loss_type", ["sigmoid"])
    if run.objective == "dpo" and isinstance(loss_type, list) and len(loss_type) == 1 and loss_type[0] in AT_LN2:
        levels["loss"] = (math.log(2), "ln 2")
    clip = number(run.config.get("max_grad_norm"))
    if clip:
        levels["grad_norm"] = (clip, words("clip", value=f"{clip:g}"))
    return levels


def skipped_steps(metrics: list[dict[str, Any]]) -> list[int]:
    """The logged steps that did not move the adapter because loss or gradient was not finite."""
    return [
        row["step"]
        for row in metrics
        if any(isinstance(row.get(key), float) and not math.isfinite(row[key]) for key in ("loss", "grad_norm"))
    ]


def categories(run: Run) -> tuple[str, list[dict[str, Any]]]:
    """The metrics of each category, of the held-out samples where they have some: the last ones and the loss over time.

    Returns the prefix of what is shown and a row per category.
    """
    for prefix in ("eval_", ""):
        start = f"{prefix}count/"
        names = dict.fromkeys(key.removeprefix(start) for row in run.metrics for key in row if key.startswith(start))
        if names:
            return prefix, [_category(run, prefix, name) for name in names]
    return "", []


def _category(run: Run, prefix: str, name: str) -> dict[str, Any]:
    loss = series(run.metrics, f"{prefix}loss/{name}")
    last: dict[str, Any] = {"name": name, "loss_series": loss if loss and loss.finite else None}
    of_hits = "mean_token_accuracy" if run.objective == "sft" else "rewards/accuracies"
    keys = {"count": "count", "loss": "loss", "accuracy": of_hits, "rewards/margins": "rewards/margins"}
    for column, key in keys.items():
        found = series(run.metrics, f"{prefix}{key}/{name}")
        last[column] = found.finite[-1].mean if found and found.finite else None
    return last
