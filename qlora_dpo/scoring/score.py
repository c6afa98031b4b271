"""`score`: how far an adapter agrees with the labels of any file of pairs, by its implicit rewards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_dpo.config.reference import RayOptions, ScoreOptions
from qlora_dpo.config.training import TrainConfig
from qlora_dpo.data.packing import PackedBatch
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import choose_device, out_of_memory
from qlora_dpo.models.lora import add_frozen_reference, load_adapter
from qlora_dpo.models.scoring import Scorer, choose_scorer
from qlora_dpo.reference.fill import LocalWay, Shard, Way, fill
from qlora_dpo.reference.flipped_labels import estimate_flipped
from qlora_dpo.reference.implicit_rewards import read_scores
from qlora_dpo.reference.local import Score, reference_score
from qlora_dpo.reference.store import ModelIdentity, ModelRows, ReferenceStore
from qlora_dpo.scoring.adapter import NONE, ScoredAdapter, check_fit, open_adapter, tokenizer_of
from qlora_dpo.scoring.ray_cluster import on_a_worker, ray_workers
from qlora_dpo.scoring.ray_workers import RayWay
from qlora_dpo.scoring.reference import load_reference, local_compute
from qlora_dpo.scoring.report import ScoreReport
from qlora_dpo.scoring.rows import ScoredRows, refuse_output, worst_lines
from qlora_dpo.training.data import load_training_data
from qlora_dpo.training.policy import load_base_config, load_base_of
from qlora_dpo.training.referencing import default_store, identity_by_files, refuse_unusable_store
from qlora_dpo.training.row_positions import check_positions

REFERENCE, POLICY = "reference", "policy"


def score(config: TrainConfig, options: ScoreOptions, ray: RayOptions) -> None:
    """The `score` command: log-probs of every pair with the adapter on and off, and what they say about the labels.

    Raises:
        QloraDpoError: one of its kinds, each saying what happened, why, and what to do.
    """
    refuse_output(options.output, str(config.data.dataset))
    refuse_unusable_store(options.store)
    adapter = None if options.adapter == NONE else open_adapter(options.adapter)
    if adapter is not None:
        check_fit(adapter, config)
    base_config = load_base_config(config.model)
    tokenizer = tokenizer_of(adapter, config)
    every_pair = replace(config.data, eval_fraction=0.0)
    data = load_training_data(every_pair, tokenizer, config.training.seed)
    check_positions(base_config, data, config.model.trust_remote_code)
    print("\n".join(line for source in data.sources for line in source.report.summary()), file=sys.stderr)
    with ways_of(config, adapter, data.pairs, ray) as ways, ExitStack() as stores:
        try:
            filled = {name: _filled(stores, name, way, data.pairs, options) for name, way in ways.items()}
        except torch.OutOfMemoryError as error:
            raise out_of_memory("scoring", choose_device(config.model.use_cpu)) from error
        scored = read_scores(data.pairs, filled[REFERENCE], filled.get(POLICY), config.loss.beta)
        flipped = None if adapter is None else estimate_flipped(scored.margins)
        report = ScoreReport(config, adapter, data, scored, flipped)
        rows = ScoredRows(data, scored, filled, tokenizer)
        report.write(options.output)
        worst = rows.write(options.output, options.worst, per_token=options.per_token)
    print(
        "\n".join(
            [
                *report.table(),
                "",
                *worst_lines(worst, scored),
                "",
                *report.verdict(),
                f"The rows are in {options.output}.",
            ]
        )
    )


@contextmanager
def ways_of(
    config: TrainConfig, adapter: ScoredAdapter | None, pairs: Sequence[Any], ray: RayOptions
) -> Iterator[dict[str, Way]]:
    """How to come by the log-probs of the reference and, with an adapter, of the policy: on this machine, or on the
    workers of a cluster, which load their model for each of the two."""
    if ray.engine == "local":
        yield local_ways(config, adapter, pairs)
        return
    with ray_workers(ray, use_gpu=not config.model.use_cpu) as workers:
        models = on_a_worker(workers, partial(identities, config, adapter))
        yield {
            name: Way(model, RayWay(partial(_local_way, name, config, adapter), pairs, model, workers))
            for name, model in models.items()
        }


def _local_way(name: str, config: TrainConfig, adapter: ScoredAdapter | None, pairs: Sequence[Any]) -> Way:
    return local_ways(config, adapter, pairs)[name]


def local_ways(config: TrainConfig, adapter: ScoredAdapter | None, pairs: Sequence[Any]) -> dict[str, Way]:
    """How to come by the log-probs of the reference and, with an adapter, of the policy: with one model in this
    machine's memory, which is loaded when the first of them is missing."""
    device = choose_device(config.model.use_cpu)

    @cache
    def loaded() -> tuple[dict[str, Score], Scorer]:
        if adapter is not None:
            return _load(config, adapter, pairs, device)
        reference = load_reference(config, pairs, device)
        return {REFERENCE: reference.score}, reference.scorer

    @cache
    def compute(name: str) -> LocalWay:
        scores, scorer = loaded()
        return local_compute(scores[name], pairs, scorer.kind, device, config.training.max_tokens_per_microbatch)

    def way(name: str, identity: ModelIdentity) -> Way:
        return Way(identity, lambda places, keep: compute(name)(places, keep))

    return {name: way(name, identity) for name, identity in identities(config, adapter).items()}


def identities(config: TrainConfig, adapter: ScoredAdapter | None) -> dict[str, ModelIdentity]:
    """Whose log-probs are compared: those of the reference and, with an adapter, of the policy, which has the identity
    that it would have as a reference."""
    found = {REFERENCE: identity_by_files(config.model)}
    if adapter is not None:
        found[POLICY] = identity_by_files(replace(config.model, reference_model=str(adapter.folder)))
    return found


def _load(
    config: TrainConfig, adapter: ScoredAdapter, pairs: Sequence[Any], device: torch.device
) -> tuple[dict[str, Score], Scorer]:
    """One base with the adapter, and the reference's adapter where that has one."""
    model = load_adapter(load_base_of(config.model, device), adapter.folder, trainable=False)
    if config.model.reference_model not in (None, config.model.model_name_or_path):
        add_frozen_reference(model, Path(str(config.model.reference_model)))
    fuse_lora(model)
    make_lean(model)
    model.eval()
    scorer = choose_scorer(model, pairs[0], device)

    def policy_score(batch: PackedBatch) -> Tensor:
        with torch.no_grad():
            return scorer.per_token_logps(model, batch)

    return {REFERENCE: reference_score(model, scorer), POLICY: policy_score}, scorer


def _filled(stores: ExitStack, name: str, way: Way, pairs: Sequence[Any], options: ScoreOptions) -> ModelRows:
    """The rows of a model that has all pairs now, in a store that stays open as long as `stores`."""
    store = stores.enter_context(ReferenceStore.open(options.store or default_store(way.identity)))
    rows = store.of(way.identity)
    computed, found = fill(pairs, rows, way, Shard(), name)
    print(f"{name}: {computed:,} pairs computed, {found - computed:,} were in {store.path}", file=sys.stderr)
    return rows
