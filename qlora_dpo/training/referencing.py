"""The reference of a run: which one it is, where its log-probs are kept, and how far off stored ones are here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_dpo.config.training import ModelOptions, TrainConfig, quantization_of
from qlora_dpo.data.packing import Pair
from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.models.loading import commit_of, load_config
from qlora_dpo.models.scoring import NOISE_MARGIN, TOLERANCE, Scorer
from qlora_dpo.reference.drift import Drift, drift_between, refuse_drift
from qlora_dpo.reference.identity import differences, local_identity, reference_cache
from qlora_dpo.reference.local import (
    NoReference,
    Reference,
    ReferenceLogps,
    Score,
    logps_by_completion,
    reference_score,
)
from qlora_dpo.reference.store import Logps, ModelIdentity, ReferenceStore
from qlora_dpo.reference.stored import StoredReference
from qlora_dpo.training.data import TrainingData
from qlora_dpo.training.engine import DEFAULT_MAX_TOKENS
from qlora_dpo.training.parallel.ranks import ALONE, Ranks
from qlora_dpo.training.row_reference import with_row_logps

CHECKED = 8  # stored pairs that are computed again when a run starts
OTHER_MODEL = 0.5  # nats per token between a reference and the base that is trained, which are meant to be alike


@contextmanager
def reference_of_run(
    config: TrainConfig, model: Any, scorer: Scorer, data: TrainingData, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[Reference]:
    """The reference in its store, or in memory where there is none. Each process reads and writes the store by itself;
    where the base is sharded it is read once and not written, because all must know what each lacks.

    Raises:
        StorageError: --reference_store cannot be used, or holds only other models.
        ModelError: what it holds is not what this device computes.
        UsageError: --reference_source names nothing in it.
    """
    if not config.has_reference:
        yield NoReference()
        return
    score = reference_score(model, scorer)
    store = _open_store(config, model)
    has_store = ranks.gather(store is not None)
    recomputed = Recomputed(score, data.pairs, scorer, device)
    if store is None or not all(has_store):
        if store is not None:  # one process can open none, and all must do the same
            store[0].close()
        yield with_row_logps(config, data, recomputed, ReferenceLogps(score))
        return
    with store[0]:
        reference = _stored(config, score, data.pairs, *store)
        pairs = list(dict.fromkeys([*data.train, *data.held_out]))
        known = ranks.share(list(reference.known(pairs)))
        print(f"reference: {len(known)} of {len(pairs)} pairs are in {store[0].path}", file=sys.stderr)
        if config.store.reference_source is not None and len(known) < len(pairs):
            raise ModelError(
                f"{store[0].path} lacks {len(pairs) - len(known)} pairs of {config.store.reference_source}, which is "
                "not here to compute them. Fill the store with it first (`reference`)."
            )
        check_drift(config, recomputed, reference, known, ranks)
        if ranks.is_sharded:
            print(
                "reference: with a sharded base the store is read and not written; `reference` fills it.",
                file=sys.stderr,
            )
            yield with_row_logps(config, data, recomputed, ReferenceLogps(score, in_memory(reference, known)))
            return
        try:
            yield with_row_logps(config, data, recomputed, reference)
        finally:
            reference.close()
            print(reference.summary() + (" (by one of the processes)" if ranks.count > 1 else ""), file=sys.stderr)


def in_memory(reference: StoredReference, known: Sequence[int]) -> dict[int, torch.Tensor]:
    """The stored log-probs of these pairs, those of both completions in one row."""
    stored = reference.stored(known)
    return {key: torch.from_numpy(np.concatenate(both)) for key, both in stored.items()}


def refuse_unusable_store(named: str | Path | None) -> None:
    """Open the store that an option names, before minutes go into loading the model.

    Raises:
        StorageError: it is no store, or cannot be written.
    """
    if named not in (None, "none"):
        ReferenceStore.open(Path(str(named)).expanduser()).close()


def identity_of_reference(options: ModelOptions, base: Any) -> ModelIdentity:
    """The identity of the reference that these options stand for; `base` is the loaded model, or its config.

    Raises:
        StorageError: its files cannot be read.
    """
    name = str(options.model_name_or_path)
    is_adapter = options.reference_model not in (None, options.model_name_or_path)
    return local_identity(
        name,
        commit=commit_of(getattr(base, "config", base)) or options.model_revision,
        quantization=quantization_of(options),
        dtype="float32" if options.dtype == "float32" else "bfloat16",
        adapter=Path(str(options.reference_model)).expanduser() if is_adapter else None,
        code=options.model_revision if options.trust_remote_code else None,
    )


def identity_by_files(options: ModelOptions) -> ModelIdentity:
    """The identity of the reference without loading it; the weights of a Hub model are downloaded.

    Raises:
        StorageError, ModelError: its files cannot be had or read.
    """
    name = str(options.model_name_or_path)
    config = load_config(name, options.model_revision, options.trust_remote_code)
    if not Path(name).expanduser().is_dir():
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(name, revision=options.model_revision, allow_patterns="model*.safetensors*")
        except (OSError, ValueError) as error:
            raise StorageError(f"the weights of {name} cannot be downloaded: {error}") from error
    return identity_of_reference(options, config)


def default_store(identity: ModelIdentity) -> Path:
    """Where the log-probs of a reference are kept unless another file is named."""
    return reference_cache() / f"{identity.fingerprint[:16]}.sqlite"


def _open_store(config: TrainConfig, model: Any) -> tuple[ReferenceStore, ModelIdentity] | None:
    """The run's store and its reference; None where there is none, or the default one cannot be used."""
    named = config.store.reference_store
    if named == "none":
        return None
    try:
        identity = identity_of_reference(config.model, model)
        return ReferenceStore.open(Path(named).expanduser() if named else default_store(identity)), identity
    except StorageError as error:
        if named:
            raise
        print(f"warning: {error} The run keeps the reference in memory.", file=sys.stderr)
        return None


def _stored(
    config: TrainConfig, score: Score, pairs: Sequence[Pair], store: ReferenceStore, own: ModelIdentity
) -> StoredReference:
    """The reference among the models of a store."""
    source, models = config.store.reference_source, [model.identity for model in store.models()]
    if source is not None:
        return StoredReference(score, pairs, store.of(find_model(store.path, models, source)), may_compute=False)
    if config.store.reference_store and models and own.fingerprint not in {model.fingerprint for model in models}:
        others = "\n".join(_words(model, own) for model in models)
        raise StorageError(
            f"{store.path} holds other models' log-probs, and none of this run's reference:\n{others}\nName another "
            "file, fill this one for it (`reference --store`), or choose one of these with --reference_source."
        )
    return StoredReference(score, pairs, store.of(own))


def _words(model: ModelIdentity, own: ModelIdentity) -> str:
    names = ", ".join(name for name in differences(model.description, own.description))
    return f"  {model.fingerprint[:16]} ({model.description.get('model', 'no name')}): it differs in {names}"


def find_model(path: Path, models: Sequence[ModelIdentity], source: str) -> ModelIdentity:
    """The model that --reference_source names.

    Raises:
        UsageError: there is none, or more than one.
    """
    found = [model for model in models if model.fingerprint.startswith(source) or source in model.description.values()]
    if len(found) != 1:
        listed = "\n".join(f"  {model.fingerprint[:16]}  {model.description.get('model', '')}" for model in models)
        raise UsageError(
            f"--reference_source {source}: {len(found)} models in {path} are called so. It holds:\n{listed or '  none'}"
        )
    return found[0]


class Recomputed:
    """Log-probs of pairs as this device computes them now."""

    def __init__(self, score: Score, pairs: Sequence[Pair], scorer: Scorer, device: torch.device) -> None:
        self._score, self._pairs, self._scorer, self._device = score, pairs, scorer, device

    def __call__(self, places: Sequence[int], max_tokens: int = DEFAULT_MAX_TOKENS) -> list[Logps]:
        """Of both completions of each pair, in the order chosen_0, rejected_0, chosen_1, ..."""
        pairs = [self._pairs[place] for place in places]
        return logps_by_completion(
            self._score, pairs, kind=self._scorer.kind, device=self._device, max_tokens=max_tokens
        )


def check_drift(
    config: TrainConfig, recomputed: Recomputed, reference: StoredReference, known: Sequence[int], ranks: Ranks = ALONE
) -> None:
    """Compute a few stored pairs again and say how far they are off.

    Raises:
        ModelError: too far.
    """
    source = config.store.reference_source
    drift, limit = measured_drift(config, recomputed, reference, known, CHECKED, config.store.max_drift, ranks)
    if drift is None:
        return
    print(f"reference: {brief(drift) if source is None else drift}", file=sys.stderr)
    if source is not None:
        print(
            f"The reference is {source}, not the base as it is loaded here: the loss ties the policy to that model, "
            "and the margins count from it.",
            file=sys.stderr,
        )
        limit = config.store.max_drift or OTHER_MODEL
    refuse_drift(
        drift, limit, f"the stored log-probs in {reference.path}",
        "Delete that file, or leave it alone with another --reference_store.",
    )  # fmt: skip


def measured_drift(
    config: TrainConfig, recomputed: Recomputed, reference: StoredReference, known: Sequence[int], count: int,
    max_drift: float | None, ranks: Ranks = ALONE,
) -> tuple[Drift | None, float]:  # fmt: skip
    """How far `count` stored pairs are off, None where there are none; and how far they may be."""
    stored = ranks.agree(reference.stored(list(islice(known, 0, None, max(1, len(known) // count)))[:count]))
    limit = max_drift or TOLERANCE[torch.float32 if config.model.dtype == "float32" else torch.bfloat16]
    if not stored:
        return None, limit
    ours = recomputed(list(stored))
    drift = ranks.agree(drift_between(list(chain.from_iterable(stored.values())), ours, config.loss.beta))
    if max_drift is None and drift.mean_per_token > limit:
        limit = max(limit, own_rounding(recomputed, list(stored), ours))
    return drift, ranks.agree(limit)


def own_rounding(recomputed: Recomputed, places: Sequence[int], ours: Sequence[Logps]) -> float:
    """How far two exact paths of this model may differ per token, where it rounds more than most: a multiple of what
    the cut into micro-batches changes in `ours`."""
    alone = recomputed(places, max_tokens=1)
    return NOISE_MARGIN * drift_between(alone, ours, beta=1.0).mean_per_token


def brief(drift: Drift) -> str:
    """A drift that is rounding, in one sentence."""
    return (
        f"{drift.pairs} stored pairs computed again here differ by {drift.mean_per_token:.2g} per token on average, by "
        f"{drift.max_per_token:.2g} at most"
    )
