"""What `score` found out about a data set: as a table, as JSON beside the rows, and in sentences."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.config.training import TrainConfig, quantization_of
from qlora_dpo.data.files.readers import file_kind
from qlora_dpo.errors import StorageError
from qlora_dpo.reference.flipped_labels import FlippedLabels
from qlora_dpo.reference.implicit_rewards import Scored
from qlora_dpo.scoring.adapter import NONE, ScoredAdapter
from qlora_dpo.terminal import visible
from qlora_dpo.training.data import TrainingData
from qlora_dpo.training.folder.run_folder import write_atomically

SHOWN_CATEGORIES = 20
_WIDEST = 30  # characters of a category's name

_OF_REWARDS = {
    "accuracy": "rewards/accuracies",
    "margin": "rewards/margins",
    "chosen": "rewards/chosen",
    "rejected": "rewards/rejected",
}
_OF_MODEL = {
    "accuracy": "accuracies",
    "margin": "margins",
    "chosen": "logps_per_token/chosen",
    "rejected": "logps_per_token/rejected",
}


@dataclass(frozen=True)
class ScoreReport:
    """The scores of a data set, together."""

    config: TrainConfig
    adapter: ScoredAdapter | None
    data: TrainingData
    scored: Scored
    flipped: FlippedLabels | None
    """None without an adapter: nobody has learned from labels what is better then."""

    def write(self, output: Path) -> None:
        """Write the summary beside the rows.

        Raises:
            StorageError: the disk refuses.
        """
        file = summary_path(output)
        try:
            write_atomically(file, json.dumps(self.as_json(), ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise StorageError(
                f"{file} cannot be written: {error.strerror or error}. Make room there and run the same command again; "
                "what was computed is in the store."
            ) from error

    def as_json(self) -> dict[str, Any]:
        """Everything but the rows."""
        reports = [source.report for source in self.data.sources]
        refused: Counter[str] = sum((report.refused_by_reason for report in reports), Counter())
        model = self.config.model
        return {
            "adapter": NONE if self.adapter is None else str(self.adapter.folder),
            "model_name_or_path": model.model_name_or_path,
            "reference_model": model.reference_model,
            "quantization": quantization_of(model),
            "beta": None if self.adapter is None else self.config.loss.beta,
            "dataset": self.config.data.dataset,
            "trained_on_dataset": self._is_remembered,
            "rows_read": sum(report.rows_read for report in reports),
            "pairs": len(self.data.pairs),
            "refused": dict(refused.most_common()),
            "margin_of": self.scored.margin_of,
            "all": self.scored.means(),
            "accuracy_interval": self.scored.accuracy_interval,
            "categories": self.scored.by_category(self._categories()),
            "flipped_labels": None if self.flipped is None else asdict(self.flipped),
        }

    def table(self) -> list[str]:
        """A row for all pairs and one for each category."""
        categories = self.scored.by_category(self._categories())
        rows = {"all": self.scored.means(), **dict(list(categories.items())[:SHOWN_CATEGORIES])}
        names = [visible(name[:_WIDEST]) for name in rows]
        width = max(map(len, ["category", *names]))
        columns = _OF_REWARDS if self.adapter else _OF_MODEL
        lines = [self._title(), f"{'category':{width}}  {'pairs':>9}" + "".join(f"  {name:>9}" for name in columns)]
        for name, means in zip(names, rows.values(), strict=True):
            cells = "".join(f"  {means[key]:9.3f}" for key in columns.values())
            lines.append(f"{name:{width}}  {means['count']:9,.0f}{cells}")
        if len(categories) > SHOWN_CATEGORIES:
            lines.append(f"... and {len(categories) - SHOWN_CATEGORIES} more categories, which are in the summary")
        return lines

    def verdict(self) -> list[str]:
        """What follows for the labels."""
        if self.flipped is None:
            return [
                "Without an adapter nobody has learned from labels what is better, so the share of flipped ones is not "
                "estimated."
            ]
        return [str(self.flipped), self._note()]

    def _title(self) -> str:
        base = self.config.model.model_name_or_path
        if self.adapter is None:
            return f"Log-probs per token of {base} itself; the margin is chosen minus rejected:"
        return f"Implicit rewards of {self.adapter.folder} on {base} (beta {self.config.loss.beta:g}):"

    def _note(self) -> str:
        if self._is_remembered:
            return (
                "The adapter was trained on this very data set, so it remembers labels, wrong ones too: true accuracy "
                "is lower and more labels are flipped than this says. Score pairs that it has not seen."
            )
        return "This holds for pairs that the adapter was not trained on; those that it was, it remembers."

    @property
    def _is_remembered(self) -> bool:
        return self.adapter is not None and self.adapter.was_trained_on(self.config)

    def _categories(self) -> list[str | None]:
        """The category of every pair; in a mixture a pair without one has the name of its source."""
        names = [None] * len(self.data.sources) if self.data.mixed is None else self.data.mixed.names
        return [
            category or name
            for source, name in zip(self.data.sources, names, strict=True)
            for category in source.categories()
        ]


def summary_path(output: Path) -> Path:
    """Where the summary of a file of scores lies."""
    return output.with_name(output.name[: -len(file_kind(output) or "")] + ".summary.json")
