"""The samples of a run, pairs or conversations: which are trained on, which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.chained import Chained
from qlora_dpo.data.dataset import (
    ConversationDataset,
    PairDataset,
    load_conversation_dataset,
    load_preference_dataset,
    split_by_prompt,
)
from qlora_dpo.data.files.sources import with_config
from qlora_dpo.data.mixtures.mixture import is_mixture
from qlora_dpo.data.mixtures.sampling import Sampler
from qlora_dpo.errors import DataError
from qlora_dpo.objectives.categories import Categories, make_categories
from qlora_dpo.training.mixing import Mixed, load_mixed


@dataclass(frozen=True)
class TrainingData:
    """All samples in one sequence, and the places in it that are trained on and held out."""

    pairs: Sequence[Any]
    train: list[int]
    held_out: list[int]
    sources: Sequence[PairDataset | ConversationDataset]
    mixed: Mixed | None = None
    """How the sources are drawn from, where they are a mixture."""

    @property
    def fingerprint(self) -> str:
        """Hash of every token id that the run may see, and of the rates of a mixture."""
        of_ids = hashlib.sha256("".join(source.fingerprint for source in self.sources).encode()).hexdigest()
        return of_ids if self.mixed is None else self.mixed.fingerprint(of_ids)

    @property
    def sampler(self) -> Sampler | None:
        """Draws the pairs of each epoch; without one every epoch takes all."""
        return None if self.mixed is None else self.mixed.sampler

    def epoch(self, number: int) -> Sequence[int]:
        """Places of the pairs of an epoch, counted from 0; a place as often as it is taken."""
        return self.train if self.sampler is None else self.sampler.epoch(number)

    def categories(self) -> Categories | None:
        """The categories that metrics are given by; None where there are not two."""
        names = [None] * len(self.sources) if self.mixed is None else self.mixed.names
        found = [
            category or name
            for source, name in zip(self.sources, names, strict=True)
            for category in source.categories()
        ]
        return make_categories(found, [*self.train, *self.held_out])

    def summary(self) -> list[str]:
        """What was read, refused, truncated, and how it is divided; one line each."""
        lines = [line for source in self.sources for line in source.report.summary()]
        lines += [] if self.mixed is None else self.mixed.summary()
        return [*lines, f"{len(self.train)} {self.unit} to train on, {len(self.held_out)} held out"]

    @property
    def unit(self) -> str:
        """What the samples are called."""
        return self.sources[0].report.unit


def _of_pairs(options: DataOptions) -> dict[str, Any]:
    return {
        "prompt_key": options.prompt_key,
        "chosen_key": options.chosen_key,
        "rejected_key": options.rejected_key,
        "category_key": options.category_key,
        "confidence_key": options.confidence_key,
        "ignore_columns": options.ignore_columns,
        "max_prompt_length": options.max_prompt_length,
    }


def _of_conversations(options: DataOptions) -> dict[str, Any]:
    return {
        "messages_key": options.messages_key,
        "prompt_key": options.prompt_key,
        "response_key": options.response_key,
        "category_key": options.category_key,
        "ignore_columns": options.ignore_columns,
    }


# What reads the data of an objective, and the options that only it reads.
_LOADERS: dict[
    str, tuple[Callable[..., PairDataset | ConversationDataset], Callable[[DataOptions], dict[str, Any]]]
] = {"dpo": (load_preference_dataset, _of_pairs), "sft": (load_conversation_dataset, _of_conversations)}


def load_training_data(options: DataOptions, tokenizer: Any, seed: int) -> TrainingData:
    """Read and tokenize --dataset and hold out what the options say.

    Raises:
        DataError, StorageError, UsageError: see `load_preference_dataset`; and no pair is left to train on.
    """
    assert options.dataset is not None
    load, own_options = _LOADERS[options.objective]
    read = own_options(options) | {
        "dataset_format": options.dataset_format,
        "bad_rows": options.bad_rows,
        "max_length": options.max_length,
        "tokenizer": tokenizer,
    }
    if is_mixture(options.dataset):
        mixed = load_mixed(options, load, read, seed)
        return TrainingData(mixed.samples, mixed.train, mixed.held_out, mixed.sources, mixed)
    dataset = with_config(options.dataset, options.dataset_config)
    training = load(dataset, split=options.dataset_split, revision=options.dataset_revision, **read)
    if options.eval_dataset or options.eval_split:
        # A dataset that is named for evaluation may have a test split, the training split, or no splits at all.
        name, split = options.eval_dataset or dataset, options.eval_split or options.dataset_split
        revision = None if options.eval_dataset else options.dataset_revision
        held_out = load(name, split=split, revision=revision, **read)
        pairs: Sequence[Any] = Chained(training, held_out)
        train, evaluated = list(range(len(training))), list(range(len(training), len(pairs)))
        sources = [training, held_out]
    else:
        pairs, sources = training, [training]
        train, evaluated = split_by_prompt(training, options.eval_fraction, seed)
    train, evaluated = train[: options.max_train_samples], evaluated[: options.max_eval_samples]
    if not train:
        raise DataError(
            f"{options.dataset} leaves nothing to train on: {len(pairs)} usable {training.report.unit}. Add rows or "
            "lower --eval_fraction."
        )
    return TrainingData(pairs, train, evaluated, sources)
