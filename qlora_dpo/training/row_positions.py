"""Rows that are longer than the base has positions, found before its weights are loaded."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from qlora_dpo.errors import UsageError
from qlora_dpo.models.loading import model_on_meta
from qlora_dpo.models.positions import known_positions, table_of_positions
from qlora_dpo.training.data import TrainingData
from qlora_dpo.training.memory.levels import PairLengths, lengths_of


def check_positions(base_config: Any, data: TrainingData, trust_remote_code: bool = False) -> None:
    """Refuse rows that go past a table of positions; warn of rows that go past what rotations were trained on.

    Raises:
        UsageError: with the longest row.
    """
    known = known_positions(base_config)
    if known is None:
        return
    places = [*data.train, *data.held_out]
    found = lengths_of(data, places)
    tokens = found.prompt + np.maximum(found.chosen, found.rejected) if isinstance(found, PairLengths) else found.tokens
    longer = int((tokens > known).sum())
    if not longer:
        return
    longest = int(tokens.argmax())
    what = (
        f"{longer:,} of {len(places):,} rows are longer than the {known:,} positions of this base; the longest, "
        f"{data.pairs[places[longest]].origin}, has {int(tokens[longest]):,} tokens"
    )
    if table_of_positions(model_on_meta(base_config, trust_remote_code)) is not None:
        raise UsageError(f"{what}. It has no more: cut them with --max_length {known}.")
    print(f"warning: {what}. What it never saw, it does badly: cut them with --max_length {known}.", file=sys.stderr)
