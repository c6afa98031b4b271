"""The reference of a run whose log-probs outlive it: read from a store, and written to it where they are missing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from qlora_dpo.data.packing import PackedBatch, Pair
from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.reference.local import ReferenceLogps, Score, split_by_completion
from qlora_dpo.reference.store import Logps, ModelRows, completion_key, why_no_logps

RETRY = 60.0  # seconds until a store that took nothing is tried again
AT_ONCE = 1000  # pairs that are looked up in one go


class StoredReference:
    """Per-token reference log-probs by pair, the same through all epochs and later runs.

    The value of a completion is that of the micro-batch in which it came first: how often a run is stopped and
    continued, or how many of a micro-batch's pairs are known, changes none. A store that fails costs nothing but the
    rows that could not be kept: the run goes on with them in memory.
    """

    def __init__(self, score: Score, pairs: Sequence[Pair], rows: ModelRows, *, may_compute: bool = True) -> None:
        """`may_compute` is false where the rows are another model's than `score` runs, so that none could be added."""
        self._score, self._pairs, self._rows = score, pairs, rows
        self._may_compute = may_compute
        self._memory: dict[bytes, Logps] = {}  # what the store did not take
        self._is_lost = self._has_warned = False
        self._next_try = 0.0
        self._computed: set[int] = set()
        self._found: set[int] = set()

    @property
    def path(self) -> Path:
        """The file of the store."""
        return self._rows.store.path

    def __call__(self, keys: Sequence[int], batch: PackedBatch) -> Tensor:
        """Log-probs [N] of the batch, whose pairs are named by `keys` [B]."""
        completions = self._completions(keys)
        known = self._look_up(completions)
        missing = self._lacking(keys, completions, known)
        self._computed.update(missing)
        self._found.update(set(keys) - self._computed)
        if missing:
            known |= self._compute(missing, completions, known, batch)
        values = torch.from_numpy(np.concatenate([known[completion] for completion in completions]))
        return values.to(batch.target_ids.device, non_blocking=True)

    def unknown(self, keys: Sequence[int]) -> list[int]:
        """Those of the pairs that have not been scored yet."""
        completions = self._completions(keys)
        return self._lacking(keys, completions, self._look_up(completions))

    def forget(self, keys: Sequence[int]) -> None:
        """Score these pairs anew when they come again."""
        self._computed.difference_update(keys)
        completions = self._completions(keys)
        for completion in completions:
            self._memory.pop(completion, None)
        if completions and not self._is_lost:
            try:
                self._rows.discard(completions)
            except StorageError as error:
                self._lose(error)

    def blank(self) -> ReferenceLogps:
        """The same reference, computed here, with nothing scored yet."""
        return ReferenceLogps(self._score)

    def known(self, keys: Sequence[int]) -> Iterator[int]:
        """Those of the pairs that are in the store; none from where on it cannot be read."""
        for start in range(0, len(keys), AT_ONCE):
            some = keys[start : start + AT_ONCE]
            completions = self._completions(some)
            try:
                stored = self._rows.has(completions)
            except StorageError as error:
                self._lose(error)
                return
            both = zip(some, completions[::2], completions[1::2], strict=True)
            yield from (key for key, chosen, rejected in both if chosen in stored and rejected in stored)

    def stored(self, keys: Sequence[int]) -> dict[int, tuple[Logps, Logps]]:
        """Chosen and rejected log-probs of those pairs of which both are whole."""
        completions = self._completions(keys)
        found = self._look_up(completions)
        both = zip(keys, completions[::2], completions[1::2], strict=True)
        return {key: (found[one], found[other]) for key, one, other in both if one in found and other in found}

    def close(self) -> None:
        """Try once more to write what the store did not take."""
        self._next_try = 0.0
        self._write()

    def summary(self) -> str:
        """What was computed and what was there, in one line."""
        left = f"; {len(self._memory)} rows could not be written" if self._memory else ""
        return f"reference: {len(self._computed)} pairs computed, {len(self._found)} from the store {self.path}{left}"

    def _completions(self, keys: Sequence[int]) -> list[bytes]:
        """The keys of both completions of each pair: chosen_0, rejected_0, chosen_1, ..."""
        pairs = [self._pairs[key] for key in keys]
        return [completion_key(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]

    def _lacking(self, keys: Sequence[int], completions: Sequence[bytes], known: dict[bytes, Logps]) -> list[int]:
        both = zip(keys, completions[::2], completions[1::2], strict=True)
        return [key for key, chosen, rejected in both if chosen not in known or rejected not in known]

    def _look_up(self, completions: Sequence[bytes]) -> dict[bytes, Logps]:
        found = {completion: self._memory[completion] for completion in completions if completion in self._memory}
        wanted = list(dict.fromkeys(completion for completion in completions if completion not in found))
        if wanted and not self._is_lost:
            try:
                found |= self._rows.get(wanted)
            except StorageError as error:
                self._lose(error)
        return found

    def _compute(
        self, missing: Sequence[int], completions: Sequence[bytes], known: dict[bytes, Logps], batch: PackedBatch
    ) -> dict[bytes, Logps]:
        """Score the whole micro-batch, so that the values do not depend on what is known, and keep what is new."""
        if not self._may_compute:
            raise ModelError(
                f"{self.path} has lost rows of {len(missing)} pairs, and the model that --reference_source "
                "names is not here to compute them. Fill the store with it again (`reference`)."
            )
        new: dict[bytes, Logps] = {}
        for completion, values in zip(completions, split_by_completion(self._score(batch), batch), strict=True):
            if completion not in known:
                new.setdefault(completion, values)
        self._memory |= new
        self._write()
        return new

    def _write(self) -> None:
        """Bring what is in memory into the store; numbers that are none never get there."""
        if self._is_lost or time.monotonic() < self._next_try:
            return
        writable = {key: values for key, values in self._memory.items() if why_no_logps(values) is None}
        try:
            self._rows.put(writable)
        except StorageError as error:
            if not self._has_warned:
                self._has_warned = True
                _warn(f"{error} The run goes on with the reference in memory and tries again every minute.")
            self._next_try = time.monotonic() + RETRY
            return
        for key in writable:
            del self._memory[key]

    def _lose(self, error: StorageError) -> None:
        self._is_lost = True
        _warn(f"{error} The run goes on with the reference in memory.")


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
