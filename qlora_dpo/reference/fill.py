"""Fills a store ahead of the runs that read it, in any way that log-probs can be computed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from tqdm import tqdm

from qlora_dpo.data.packing import LayoutKind, Pair, batch_cost, pack, token_cost
from qlora_dpo.errors import UsageError
from qlora_dpo.reference.local import Score, split_by_completion
from qlora_dpo.reference.store import Logps, ModelIdentity, ModelRows, completion_key

WINDOW = 1024  # pairs that are sorted by length, so that micro-batches become full
AT_ONCE = 1000  # pairs that are looked up in one go

Keep = Callable[[Mapping[bytes, Logps]], None]
"""Writes rows, by the keys of their completions."""


@dataclass(frozen=True)
class Way:
    """A way to come by log-probs."""

    identity: ModelIdentity
    """Whose they are."""
    compute: Callable[[Sequence[int], Keep], None]
    """Computes both completions of the pairs at these places and keeps them as they come."""
    check: Callable[[ModelRows], None] = lambda rows: None
    """Compares some of what it would compute with what the store has, before anything is added."""


@dataclass(frozen=True)
class Shard:
    """The part of the pairs that one of several processes computes; `number` counts from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`2/3`.

        Raises:
            UsageError: it is nothing of that kind.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        number, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= number <= of:
            raise UsageError(f"--shard {text}: write which part of how many, such as 1/2 and 2/2.")
        return cls(number, of)

    def has(self, key: bytes) -> bool:
        """Whether the pair whose chosen completion has this key belongs to it."""
        return int.from_bytes(key[:8], "big") % self.of == self.number - 1


def fill(pairs: Sequence[Pair], rows: ModelRows, way: Way, shard: Shard, name: str = "reference") -> tuple[int, int]:
    """Compute what the store lacks of the shard's pairs; returns how many were computed, and how many there were.

    `name` is what the progress bar calls them.

    What was computed is in the store when a kill comes, but for the micro-batch that was being computed.

    Raises:
        StorageError: the store takes nothing more.
    """
    own, missing = _missing(pairs, rows, shard)
    seconds = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=2 * len(missing), unit=" completions", desc=name, mininterval=seconds, file=sys.stderr) as bar:

        def keep(new: Mapping[bytes, Logps]) -> None:
            rows.put(new)
            bar.update(len(new))

        if missing:
            way.check(rows)
            way.compute(missing, keep)
    return len(missing), own


def keys_of(pair: Pair) -> tuple[bytes, bytes]:
    """The keys of the chosen and the rejected completion."""
    return completion_key(pair.prompt_ids, pair.chosen_ids), completion_key(pair.prompt_ids, pair.rejected_ids)


def _missing(pairs: Sequence[Pair], rows: ModelRows, shard: Shard) -> tuple[int, list[int]]:
    """How many pairs the shard has, and the places of those of which a completion is missing or damaged."""
    count, missing = 0, []
    for start in range(0, len(pairs), AT_ONCE):
        keys = {place: keys_of(pairs[place]) for place in range(start, min(start + AT_ONCE, len(pairs)))}
        own = {place: both for place, both in keys.items() if shard.has(both[0])}
        known = rows.get([key for both in own.values() for key in both])
        missing += [place for place, both in own.items() if not known.keys() >= set(both)]
        count += len(own)
    return count, missing


class LocalWay:
    """Computes with the model at hand, in micro-batches of up to `max_tokens`; where one does not fit into the memory,
    from there on of half as many."""

    def __init__(
        self, score: Score, pairs: Sequence[Pair], *, kind: LayoutKind, device: torch.device, max_tokens: int
    ) -> None:
        self._score, self._pairs, self._kind, self._device = score, pairs, kind, device
        self.max_tokens = max_tokens

    def __call__(self, places: Sequence[int], keep: Keep) -> None:
        """Compute the pairs at these places.

        Raises:
            torch.OutOfMemoryError: a pair does not fit even alone.
        """
        for start in range(0, len(places), WINDOW):
            window = [self._pairs[place] for place in places[start : start + WINDOW]]
            left = sorted(window, key=lambda pair: token_cost(pair, self._kind), reverse=True)
            while left:
                count = self._fitting(left)
                new = self._try(left[:count])
                if new is None:
                    self._halve(left[:count])
                else:
                    keep(new)
                    left = left[count:]

    def _fitting(self, pairs: Sequence[Pair]) -> int:
        """How many of the first pairs fit into one micro-batch, at least one; the first is the longest."""
        total, longest = 0, token_cost(pairs[0], self._kind)
        for count, pair in enumerate(pairs):
            total += token_cost(pair, self._kind) if self._kind == "shared" else longest
            if count and total > self.max_tokens:
                return count
        return len(pairs)

    def _try(self, pairs: Sequence[Pair]) -> dict[bytes, Logps] | None:
        """The rows of these pairs; None where the memory runs out."""
        # Not an except block: in there the error's traceback would still hold what did not fit.
        with suppress(torch.OutOfMemoryError):
            batch = pack(pairs, self._kind).to(self._device)
            keys = [key for pair in pairs for key in keys_of(pair)]
            return dict(zip(keys, split_by_completion(self._score(batch), batch), strict=True))
        return None

    def _halve(self, pairs: Sequence[Pair]) -> None:
        torch.cuda.empty_cache()  # does nothing where there is no GPU
        cost = batch_cost(pairs, self._kind)
        if len(pairs) == 1:
            raise torch.OutOfMemoryError(f"{cost} tokens do not fit, and no smaller part can be computed alone")
        self.max_tokens = cost // 2
        tqdm.write(
            f"out of memory: from here on at most {self.max_tokens} tokens go through the model at once",
            file=sys.stderr,
        )
