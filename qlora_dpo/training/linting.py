"""The lint of `train`: over the pairs that are trained on and held out, once for the same pairs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.data.linting.lint import LINT_VERSION, lint_pairs, tokenized_source
from qlora_dpo.data.linting.report import LintReport
from qlora_dpo.data.linting.tokens import facts_of
from qlora_dpo.errors import DataError
from qlora_dpo.training.folder.run_folder import write_atomically

if TYPE_CHECKING:
    from qlora_dpo.training.data import TrainingData

SHOWN = 3
_KEPT_ROWS = 20  # of each rule


def lint_training_data(options: DataOptions, data: TrainingData, tokenizer: Any) -> LintReport | None:
    """Apply the rules of `data lint`, or take what they found in the same pairs from the cache, and print it.

    Returns what was found, None where nothing was looked at.

    Raises:
        DataError: a rule found errors and --lint is block.
    """
    datasets = [source for source in data.sources if isinstance(source, PairDataset)]
    if options.lint == "off" or len(datasets) < len(data.sources):
        return None
    file = datasets[0].folder / f"lint-{_key(datasets, data)}.json"
    report = _read(file)
    if report is None:
        report = lint_pairs(
            [tokenized_source(dataset) for dataset in datasets],
            train=data.train,
            held_out=data.held_out,
            facts=facts_of(tokenizer, options.max_length, options.max_prompt_length),
            bad_rows="known",
        )
        with suppress(OSError):  # a cache that cannot be written costs only time
            write_atomically(file, json.dumps(report.as_json(_KEPT_ROWS), ensure_ascii=False))
    if report.counts:
        print("\n".join(report.lines(SHOWN)), file=sys.stderr)
    if options.lint == "block":
        refuse_errors(report, str(options.dataset))
    return report


def refuse_errors(report: LintReport, file: str) -> None:
    """Refuse pairs with errors.

    Raises:
        DataError: naming the rules and the first row of each.
    """
    blocking = report.blocking()
    if not blocking:
        return
    first = "\n".join(f"  {report.rows[name][0]} (1 of {report.counts[name]:,} rows)" for name in blocking)
    raise DataError(
        f"{file} should not be trained on as it is:\n{first}\nRepair the rows (`data lint --json OUT` lists them all), "
        "or go on as they are with --lint warn."
    )


def _key(datasets: Sequence[PairDataset], data: TrainingData) -> str:
    """Hash of everything that a report depends on; a store's name stands for its source, tokenizer and limits."""
    digest = hashlib.sha256(repr((LINT_VERSION, [dataset.folder.name for dataset in datasets])).encode())
    for places in (data.train, data.held_out):
        digest.update(np.array([len(places), *places], np.int64).tobytes())
    return digest.hexdigest()[:32]


def _read(file: Path) -> LintReport | None:
    try:
        return LintReport.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
