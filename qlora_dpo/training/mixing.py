"""The samples of a run on a mixture: all sources in one sequence, what is held out, and how each epoch is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.chained import Chained, Chosen
from qlora_dpo.data.dataset import ConversationDataset, PairDataset, split_by_prompt
from qlora_dpo.data.mixtures.mixture import MixtureSource, read_mixture
from qlora_dpo.data.mixtures.sampling import LEFT_OUT, Sampler
from qlora_dpo.data.mixtures.strata import Share, Strata, sentences_of
from qlora_dpo.errors import UsageError

Loader = Callable[..., PairDataset | ConversationDataset]

_AT_SOURCE = "write it there, at the source that it is of"
# Options of a single data set that a mixture has for each of its sources; with --eval_dataset they are of that.
_OF_ONE = {"dataset_format", "dataset_split"} | {
    option.name for option in fields(DataOptions) if option.name.endswith(("_key", "_columns"))
}
# Options that a mixture cannot go with, and what to do instead.
_MEANINGLESS = {
    "dataset_revision": _AT_SOURCE,
    "dataset_config": _AT_SOURCE,
    "eval_split": "name --eval_dataset, or hold out with --eval_fraction",
    "max_train_samples": "lower the rates in the mixture, or give --max_steps",
}


@dataclass(frozen=True)
class Mixed:
    """The tokenized sources of a mixture, then that of --eval_dataset, and the places that are trained on."""

    sources: Sequence[PairDataset | ConversationDataset]
    names: Sequence[str | None]
    """What stands for the category of a sample without one, by source."""
    train: list[int]
    held_out: list[int]
    sampler: Sampler
    strata: Strata
    shares: Sequence[Share]
    """What the first epoch has of every group."""

    @property
    def samples(self) -> Sequence[Any]:
        """The samples of all sources."""
        return Chained(*self.sources)

    def fingerprint(self, of_ids: str) -> str:
        """Hash of the token ids, which have this one, and of all rates."""
        return hashlib.sha256(f"{of_ids} {self.strata.fingerprint()}".encode()).hexdigest()

    def summary(self) -> list[str]:
        """What the mixture is made of; one line each."""
        return [*self.strata.notes(), *sentences_of(self.shares)]


def load_mixed(options: DataOptions, load: Loader, read: dict[str, Any], seed: int) -> Mixed:
    """Read and tokenize the sources of the mixture --dataset, hold out by prompt, then leave the rest to be drawn.

    `load` reads a data set of the run's objective, and `read` has its arguments for a single one.

    Raises:
        DataError, StorageError, UsageError: see `read_mixture` and `load_preference_dataset`; options that a mixture
            does not go with; and nothing is left to train on.
    """
    refuse_ignored(options)
    mixture = read_mixture(str(options.dataset))
    sources = [_load_source(source, load, read) for source in mixture.sources]
    names: list[str | None] = [source.name for source in mixture.sources]
    strata = Strata(mixture)
    for number, source in enumerate(sources):
        strata.add(number, source.categories())
    groups = strata.groups()
    if options.eval_dataset:
        sources.append(load(options.eval_dataset, split=options.dataset_split, **read))
        names.append(None)
        held_out = list(range(len(groups), len(groups) + len(sources[-1])))[: options.max_eval_samples]
    else:
        # Not the first ones of what is held out, which would all be of the first source.
        usable: list[int] = np.flatnonzero(groups != LEFT_OUT).tolist()
        drawn_from: Sequence[Any] = Chosen(Chained(*sources), usable)
        _, taken = split_by_prompt(drawn_from, options.eval_fraction, seed, options.max_eval_samples)
        held_out = [usable[place] for place in taken]
        groups[held_out] = LEFT_OUT
    sampler = strata.sampler(groups, seed)
    train = np.flatnonzero(groups != LEFT_OUT).tolist()
    return Mixed(sources, names, train, held_out, sampler, strata, strata.shares(groups, sampler.times(0)))


def _load_source(source: MixtureSource, load: Loader, read: dict[str, Any]) -> PairDataset | ConversationDataset:
    """Tokenize one source of a mixture, or take it from the cache."""
    unread = sorted(source.keys.keys() - read.keys())
    if unread:
        raise UsageError(f"{source.path}: {', '.join(unread)} in the mixture would be ignored: no such column is read.")
    shared = {name: value for name, value in read.items() if name not in _OF_ONE}
    return load(
        source.path,
        split=source.split,
        revision=source.revision,
        dataset_format=source.format,
        **source.keys,
        **shared,
    )


def refuse_ignored(options: DataOptions) -> None:
    """Refuse options that would not be read because --dataset is a mixture.

    Raises:
        UsageError: naming them.
    """
    defaults = DataOptions()
    names = _MEANINGLESS.keys() | (set() if options.eval_dataset else _OF_ONE)
    problems = [
        f"--{name} {getattr(options, name)} would be ignored: --dataset {options.dataset} is a mixture; "
        f"{_MEANINGLESS.get(name, _AT_SOURCE)}."
        for name in sorted(names)
        if getattr(options, name) != getattr(defaults, name)
    ]
    if problems:
        raise UsageError("\n".join(problems))
