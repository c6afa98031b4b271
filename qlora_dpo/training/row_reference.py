"""The reference of a run whose data rows bring log-probs along: whether they can be used, and what that means."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np

from qlora_dpo.config.training import TrainConfig
from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.errors import UsageError
from qlora_dpo.reference.local import Reference
from qlora_dpo.reference.row_logps import RowReference, Sums, check_row_sums
from qlora_dpo.reference.store import Logps
from qlora_dpo.training.data import TrainingData

CHECKED = 32  # pairs whose log-probs are computed here too
MOST_DRIFT = 0.02  # nats per token


def refuse_row_sums(config: TrainConfig, data: TrainingData) -> None:
    """Refuse a loss that reads single tokens, of which rows that bring only sums say nothing.

    Raises:
        UsageError: naming the option.
    """
    if config.loss.ld_alpha is not None and _is_used(config, data):
        raise UsageError(
            f"--ld_alpha {config.loss.ld_alpha} weighs the reference's log-probs token by token, but rows of "
            f"{config.data.dataset} bring sums over whole answers. Give --row_reference ignore: they are computed here."
        )


def with_row_logps(
    config: TrainConfig, data: TrainingData, recompute: Callable[[Sequence[int]], list[Logps]], reference: Reference
) -> Reference:
    """The reference, with the log-probs that rows bring along in front, once a sample has been computed here too.

    Raises:
        ModelError: they are not those of this run's reference.
    """
    if not _is_used(config, data):
        return reference
    sums = _row_sums(data)
    pairs = list(dict.fromkeys([*data.train, *data.held_out]))
    places = [place for place in pairs if not np.isnan(sums[place]).any()]
    if not places:
        return reference
    sample = places[:: max(1, len(places) // CHECKED)][:CHECKED]
    drift = check_row_sums(
        sums[sample], recompute(sample), beta=config.loss.beta, max_drift=config.store.max_drift or MOST_DRIFT
    )
    others = f"; the other {len(pairs) - len(places):,} are computed here" if len(places) < len(pairs) else ""
    print(
        f"reference: {len(places):,} of {len(pairs):,} pairs bring their own log-probs, which are used{others}. "
        f"Of them {drift}",
        file=sys.stderr,
    )
    return RowReference(sums, reference)


def _is_used(config: TrainConfig, data: TrainingData) -> bool:
    """Whether rows bring log-probs, and nothing says that others are the reference."""
    is_asked = config.store.row_reference == "verify" and config.store.reference_source is None
    return is_asked and any(source.report.reference_logps for source in data.sources)


def _row_sums(data: TrainingData) -> Sums:
    return np.concatenate([source.reference_sums() for source in data.sources if isinstance(source, PairDataset)])
