"""`reference` and `reference verify`: log-probs of a model for the pairs of a dataset, computed ahead or once more."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from qlora_dpo.config.labeling import EndpointOptions
from qlora_dpo.config.reference import FillOptions, RayOptions, ServedOptions, StoreVerifyOptions
from qlora_dpo.config.training import LoraOptions, TrainConfig
from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.data.packing import LayoutKind, Pair, batch_cost, pack
from qlora_dpo.errors import StorageError
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import choose_device, out_of_memory
from qlora_dpo.models.scoring import Scorer, choose_scorer
from qlora_dpo.reference.commands import store_files
from qlora_dpo.reference.drift import refuse_drift
from qlora_dpo.reference.fill import LocalWay, Shard, Way, fill
from qlora_dpo.reference.local import Score, reference_score
from qlora_dpo.reference.store import ModelIdentity, ReferenceStore
from qlora_dpo.reference.stored import StoredReference
from qlora_dpo.scoring.ray_cluster import on_a_worker, ray_workers
from qlora_dpo.scoring.ray_workers import RayWay
from qlora_dpo.scoring.served import Texts, served_way
from qlora_dpo.training.data import TrainingData, load_training_data
from qlora_dpo.training.linting import lint_training_data
from qlora_dpo.training.memory.device_memory import DeviceMemory, device_memory
from qlora_dpo.training.memory.preflight import LARGE, SMALL, fitting_budget
from qlora_dpo.training.policy import load_policy, load_training_tokenizer
from qlora_dpo.training.referencing import (
    Recomputed,
    brief,
    default_store,
    identity_by_files,
    identity_of_reference,
    measured_drift,
    refuse_unusable_store,
)

ON_CPU = 8192  # tokens of a micro-batch


@dataclass(frozen=True)
class LoadedReference:
    """A reference in memory."""

    identity: ModelIdentity
    score: Score
    scorer: Scorer
    device: torch.device


def fill_store(
    config: TrainConfig, options: FillOptions, server: EndpointOptions, served: ServedOptions, ray: RayOptions
) -> None:
    """The `reference` command: compute what a store lacks of a dataset's pairs.

    Raises:
        QloraDpoError: one of its kinds, each saying what happened, why, and what to do.
    """
    shard = Shard.parse(options.shard)
    refuse_unusable_store(options.store)
    data = load_pairs(config)
    pairs = pairs_to_fill(config, data)
    if server.endpoint:
        texts = [source.texts for source in data.sources if isinstance(source, PairDataset)]
        ways = served_ways(config, server, served, ray, pairs, texts)
    else:
        ways = way_of(config, ray, pairs)
    try:
        with ways as way:
            path = options.store or default_store(way.identity)
            with ReferenceStore.open(path) as store:
                rows = store.of(way.identity)
                computed, found = fill(pairs, rows, way, shard)
                of = f" of part {options.shard}" if shard.of > 1 else ""
                size = sum(file.stat().st_size for file in store_files(path))
                print(
                    f"reference: {computed:,} pairs computed, {found - computed:,}{of} were there; {path} has "
                    f"{len(rows):,} completions of this model now ({size / 1e6:,.1f} MB)."
                )
    except torch.OutOfMemoryError as error:
        raise out_of_memory("computing the reference", choose_device(config.model.use_cpu)) from error


def verify_store(config: TrainConfig, options: StoreVerifyOptions) -> None:
    """The `reference verify` command: read every byte of a store, and compute some of its rows again.

    Raises:
        StorageError: the file is damaged, or it has no rows of this reference and these pairs.
        ModelError: the rows are not what this model gives here.
    """
    with ReferenceStore.open(options.store, read_only=True) as store:
        problems = store.problems()
        if problems:
            raise StorageError(f"{options.store} is damaged:\n" + "\n".join(f"  {line}" for line in problems))
        rows = sum(model.rows for model in store.models())
        print(f"{options.store}: all {rows:,} rows are whole.")
        if not config.is_demo:
            _verify_sample(config, options, store)


def _verify_sample(config: TrainConfig, options: StoreVerifyOptions, store: ReferenceStore) -> None:
    pairs = pairs_to_fill(config, load_pairs(config))
    loaded = load_reference(config, pairs, choose_device(config.model.use_cpu))
    reference = StoredReference(loaded.score, pairs, store.of(loaded.identity))
    known = list(reference.known(range(len(pairs))))
    recomputed = Recomputed(loaded.score, pairs, loaded.scorer, loaded.device)
    drift, limit = measured_drift(config, recomputed, reference, known, options.verify, options.max_drift)
    if drift is None:
        raise StorageError(
            f"{options.store} has no rows of this model ({loaded.identity.fingerprint[:16]}) for these pairs, so "
            "nothing can be compared. `reference info` lists the models that it has."
        )
    print(f"{len(known):,} of {len(pairs):,} pairs are there. {brief(drift)}.\n{drift}")
    refuse_drift(drift, limit, f"the log-probs in {options.store}", "Delete the file, or name the model that made it.")


def load_pairs(config: TrainConfig) -> TrainingData:
    """The dataset as `train` reads it."""
    tokenizer = load_training_tokenizer(config)
    data = load_training_data(config.data, tokenizer, config.training.seed)
    print("\n".join(data.summary()), file=sys.stderr)
    lint_training_data(config.data, data, tokenizer)
    return data


def pairs_to_fill(config: TrainConfig, data: TrainingData) -> Sequence[Any]:
    """All pairs that a run with any seed may see; with --max_train_samples those of the default seed."""
    if config.data.max_train_samples is None:
        return data.pairs
    places = dict.fromkeys([*data.train, *data.held_out])
    return [data.pairs[place] for place in places]


def load_reference(config: TrainConfig, pairs: Sequence[Any], device: torch.device) -> LoadedReference:
    """Load the reference as `train` does: the same base, layers and layout."""
    # The policy is not used: its adapter may be the smallest.
    has_adapter = config.model.reference_model not in (None, config.model.model_name_or_path)
    model = load_policy(config if has_adapter else replace(config, lora=LoraOptions(lora_r=1, lora_alpha=1)), device)
    fuse_lora(model)
    make_lean(model)
    model.eval()
    scorer = choose_scorer(model, pairs[0], device)
    return LoadedReference(identity_of_reference(config.model, model), reference_score(model, scorer), scorer, device)


@contextmanager
def way_of(config: TrainConfig, ray: RayOptions, pairs: Sequence[Any]) -> Iterator[Way]:
    """With the model, in this process or on the workers of a cluster."""
    if ray.engine == "local":
        yield local_way(config, pairs)
        return
    with ray_workers(ray, use_gpu=not config.model.use_cpu) as workers:
        # What is missing must be known before anything is computed, and so the identity before any worker has its
        # model. A node finds it by the files, without loading them; this machine may have only the tokenizer.
        identity = on_a_worker(workers, partial(identity_by_files, config.model))
        yield Way(identity, RayWay(partial(local_way, config), pairs, identity, workers))


def local_way(config: TrainConfig, pairs: Sequence[Any]) -> Way:
    """With the model in this machine's memory."""
    device = choose_device(config.model.use_cpu)
    loaded = load_reference(config, pairs, device)
    budget = config.training.max_tokens_per_microbatch
    return Way(loaded.identity, local_compute(loaded.score, pairs, loaded.scorer.kind, device, budget))


def local_compute(
    score: Score, pairs: Sequence[Pair], kind: LayoutKind, device: torch.device, budget: int | None
) -> LocalWay:
    """Computes in micro-batches of `budget` tokens, by default of as many as fit."""
    memory = device_memory(device)
    if budget is None:
        budget = ON_CPU if memory is None else measured_budget(score, pairs, kind, device, memory)
    return LocalWay(score, pairs, kind=kind, device=device, max_tokens=budget)


@contextmanager
def served_ways(
    config: TrainConfig, server: EndpointOptions, served: ServedOptions, ray: RayOptions, pairs: Sequence[Any],
    texts: Sequence[Texts],
) -> Iterator[Way]:  # fmt: skip
    """With servers, asked by this process or by the workers of a cluster; this process compares the sample."""
    way = served_by(config, server, served, pairs, texts)
    if ray.engine == "local":
        yield way
        return
    with ray_workers(ray, use_gpu=False, has_model=False) as workers:
        yield replace(way, compute=RayWay(partial(served_by, config, server, served), pairs, way.identity, workers))


def served_by(
    config: TrainConfig, server: EndpointOptions, served: ServedOptions, pairs: Sequence[Any],
    texts: Sequence[Texts] = (),
) -> Way:  # fmt: skip
    """With servers; this machine loads the model only to compare a sample. Without texts, none is asked for more than
    token ids."""

    def load() -> Recomputed:
        device = choose_device(config.model.use_cpu)
        loaded = load_reference(config, pairs, device)
        return Recomputed(loaded.score, pairs, loaded.scorer, device)

    return served_way(server, served, pairs, texts, load_training_tokenizer(config), load, beta=config.loss.beta)


def measured_budget(
    score: Score, pairs: Sequence[Pair], kind: LayoutKind, device: torch.device, memory: DeviceMemory
) -> int:
    """The largest token budget that leaves a reserve free, by the memory that two micro-batches take."""
    small = _filled(pairs, kind, SMALL)
    large = _filled(pairs, kind, max(LARGE, 2 * batch_cost(small, kind)))
    measured: dict[int, int] = {}
    try:
        for members in (small, small, large):  # the first also pays for what libraries allocate once
            memory.start()
            score(pack(members, kind).to(device))
            measured[batch_cost(members, kind)] = memory.grown()
    except torch.OutOfMemoryError:
        return LARGE  # too much already: it is halved when it is tried
    memory.start()
    return fitting_budget(measured, memory.free())


def _filled(pairs: Sequence[Pair], kind: LayoutKind, tokens: int) -> list[Pair]:
    """The first pairs that together cost at most so many tokens; at least one."""
    members: list[Pair] = []
    for pair in islice(pairs, 1000):
        if members and batch_cost([*members, pair], kind) > tokens:
            break
        members.append(pair)
    return members
