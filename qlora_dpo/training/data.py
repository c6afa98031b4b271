"""The pairs of a run: which are trained on, which are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.dataset import PairDataset, load_preference_dataset, split_by_prompt
from qlora_dpo.data.tokenization import TokenizedPair
from qlora_dpo.errors import DataError


@dataclass(frozen=True)
class TrainingData:
    """All pairs in one sequence, and the places in it that are trained on and held out."""

    pairs: Sequence[TokenizedPair]
    train: list[int]
    held_out: list[int]
    sources: tuple[PairDataset, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of every token id that the run may see."""
        return hashlib.sha256("".join(source.fingerprint for source in self.sources).encode()).hexdigest()

    def summary(self) -> list[str]:
        """What was read, refused, truncated, and how it is divided; one line each."""
        lines = [line for source in self.sources for line in source.report.summary()]
        return [*lines, f"{len(self.train)} pairs to train on, {len(self.held_out)} held out"]


def load_training_data(options: DataOptions, tokenizer: Any, seed: int) -> TrainingData:
    """Read and tokenize --dataset and hold out what the options say.

    Raises:
        DataError, StorageError, UsageError: see `load_preference_dataset`; and no pair is left to train on.
    """
    assert options.dataset is not None
    read = {
        "tokenizer": tokenizer,
        "dataset_format": options.dataset_format,
        "prompt_key": options.prompt_key,
        "chosen_key": options.chosen_key,
        "rejected_key": options.rejected_key,
        "max_length": options.max_length,
        "max_prompt_length": options.max_prompt_length,
        "bad_rows": options.bad_rows,
    }
    training = load_preference_dataset(
        options.dataset, split=options.dataset_split, revision=options.dataset_revision, **read
    )
    if options.eval_dataset or options.eval_split:
        # A dataset that is named for evaluation may have a test split, the training split, or no splits at all.
        name, split = options.eval_dataset or options.dataset, options.eval_split or options.dataset_split
        revision = None if options.eval_dataset else options.dataset_revision
        held_out = load_preference_dataset(name, split=split, revision=revision, **read)
        pairs: Sequence[TokenizedPair] = Chained(training, held_out)
        train, evaluated = list(range(len(training))), list(range(len(training), len(pairs)))
        sources: tuple[PairDataset, ...] = (training, held_out)
    else:
        pairs, sources = training, (training,)
        train, evaluated = split_by_prompt(training, options.eval_fraction, seed)
    train, evaluated = train[: options.max_train_samples], evaluated[: options.max_eval_samples]
    if not train:
        raise DataError(
            f"{options.dataset} leaves no pair to train on: {len(pairs)} usable. Add rows or lower --eval_fraction."
        )
    return TrainingData(pairs, train, evaluated, sources)


class Chained(Sequence[TokenizedPair]):
    """Two datasets one after the other."""

    def __init__(self, first: PairDataset, second: PairDataset) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self._first[index] if index < len(self._first) else self._second[index - len(self._first)]
