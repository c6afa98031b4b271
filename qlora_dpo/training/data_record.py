"""data.json of a run folder: what became of every row, and what lint found in the pairs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_dpo.data.linting.report import LintReport
from qlora_dpo.data.report import DataReport
from qlora_dpo.training.data import TrainingData
from qlora_dpo.training.folder.run_folder import write_atomically

FILE = "data.json"
_COUNTED = (
    "dataset_format", "rows_read", "pairs", "truncated_prompts", "truncated_completions", "truncated_conversations",
)  # fmt: skip


def write_data_record(folder: Path, data: TrainingData, lint: LintReport | None) -> None:
    """Write it; a disk that takes nothing more stops nothing here, since the first checkpoint will say so."""
    content = {
        "train": len(data.train),
        "held_out": len(data.held_out),
        "summary": data.summary(),
        "sources": [_of_source(source.report) for source in data.sources],
        "lint": None if lint is None else lint.as_json(0),
    }
    with suppress(OSError):
        write_atomically(folder / FILE, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _of_source(report: DataReport) -> dict[str, Any]:
    return {
        "source": str(report.source),
        **{name: getattr(report, name) for name in _COUNTED},
        "refused": dict(report.refused_by_reason),
        "repaired": dict(report.repaired),
    }
