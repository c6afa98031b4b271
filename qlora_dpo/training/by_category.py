"""The metrics of each category as they stand in metrics.jsonl, for the curves and the card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_dpo.objectives.categories import COUNT, SHOWN
from qlora_dpo.training.records.markdown import inline

TITLES = {
    "loss": "loss",
    "rewards/accuracies": "reward accuracy",
    "rewards/margins": "reward margin",
    "mean_token_accuracy": "token accuracy",
}


def logged_categories(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> list[str]:
    """The categories of the training steps or, with the prefix `eval_`, of the evaluations, in their first order."""
    start = f"{prefix}{COUNT}/"
    return list(dict.fromkeys(key.removeprefix(start) for row in rows for key in row if key.startswith(start)))


def shown_prefix(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """`eval_` where held-out pairs have categories, else that of the training steps; None where none were logged."""
    return next((prefix for prefix in ("eval_", "") if logged_categories(rows, prefix)), None)


def category_table(metrics: Mapping[str, Any]) -> list[str]:
    """The held-out metrics of one line by category, as lines of Markdown; nothing where there are no categories."""
    prefix = "eval_"
    if not logged_categories([metrics], prefix):
        return []
    columns = [name for name in SHOWN if any(key.startswith(f"{prefix}{name}/") for key in metrics)]
    unit = "tokens" if "mean_token_accuracy" in columns else "pairs"
    lines = [
        f"| category | held-out {unit} | " + " | ".join(TITLES[name] for name in columns) + " |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for category in logged_categories([metrics], prefix):
        values = [metrics.get(f"{prefix}{name}/{category}") for name in columns]
        cells = ["-" if value is None else f"{value:.4g}" for value in values]
        lines.append(
            f"| {inline(category)} | {metrics[f'{prefix}{COUNT}/{category}']:,.0f} | " + " | ".join(cells) + " |"
        )
    return lines
