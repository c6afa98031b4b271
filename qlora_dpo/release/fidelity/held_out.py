"""What a release is measured on: the pairs (or conversations) that the run held out, read again, or those of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.packing import Sample
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.release.artefact import Artefact
from qlora_dpo.training.data import load_training_data

NAME_ONE = "Name pairs with --dataset, or merge without measuring: --measure false with --base and --dtype."


@dataclass(frozen=True)
class HeldOut:
    """Samples that the adapter was not trained on."""

    source: str
    samples: list[Sample]


def read_held_out(artefact: Artefact, tokenizer: Any, dataset: str | None, count: int) -> HeldOut:
    """At most `count` samples, spread evenly over those that the run held out, or over `dataset`.

    Raises:
        UsageError: there are none.
        DataError, StorageError: they cannot be read.
    """
    if count < 1:
        raise UsageError(f"--fidelity_pairs {count}: at least one pair is needed. {NAME_ONE}")
    settings = artefact.settings
    known = {option.name: settings[option.name] for option in fields(DataOptions) if option.name in settings}
    options = DataOptions(**known)
    seed = int(settings.get("seed", 42))
    if dataset is not None:
        alone = replace(
            options, dataset=dataset, dataset_format="auto", dataset_split="train", dataset_revision=None,
            dataset_config=None, eval_dataset=None, eval_split=None, eval_fraction=0.0, max_train_samples=None,
            bad_rows="fail",
        )  # fmt: skip
        data = load_training_data(alone, tokenizer, seed)
        return HeldOut(dataset, _spread(data.pairs, data.train, count))
    if options.dataset is None:
        raise UsageError(f"{artefact.named} is of no run that held out pairs to measure a merge on. {NAME_ONE}")
    try:
        data = load_training_data(options, tokenizer, seed)
    except StorageError as error:
        raise StorageError(f"what the run held out cannot be read again: {error} {NAME_ONE}") from error
    if not data.held_out:
        raise UsageError(f"the run of {artefact.named} held out nothing to measure a merge on. {NAME_ONE}")
    return HeldOut("held out by the run", _spread(data.pairs, data.held_out, count))


def _spread(samples: Sequence[Any], places: Sequence[int], count: int) -> list[Sample]:
    chosen = np.linspace(0, len(places) - 1, min(count, len(places))).round().astype(int)
    return [samples[places[number]] for number in chosen]
