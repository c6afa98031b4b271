"""The seed's pairs: the lengths of its data, cut as its script cuts them, with random token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.scale import Scale
from benchmarks.workloads import Lengths, Row, random_rows, stored_lengths

if TYPE_CHECKING:
    from qlora_dpo.training.memory.levels import PairLengths

LONGEST = 600
"""Tokens of a prompt with one of its answers (`source_max_len` and `target_max_len` of the seed's script)."""


def seed_lengths(shorter: int = 1) -> list[Lengths]:
    """Tokens of prompt, chosen and rejected of the seed's data in a shuffled order, each divided by `shorter`."""
    return [cut_as_seed(lengths, shorter) for lengths in stored_lengths("belle")]


def cut_as_seed(lengths: Lengths, shorter: int = 1) -> Lengths:
    """Prompt and chosen answer within 600 tokens, prompt and rejected answer too; nothing becomes empty."""
    prompt = min(lengths[0], LONGEST - 2)
    chosen, rejected = (min(answer, LONGEST - prompt) for answer in lengths[1:])
    return tuple(max(2, tokens // shorter) for tokens in (prompt, chosen, rejected))  # type: ignore[return-value]


def seed_rows(scale: Scale, model: str, count: int) -> list[Row]:
    """The first `count` pairs, as token ids of this model; they begin again after the last."""
    lengths = islice(cycle(seed_lengths(scale.shorter)), count)
    return random_rows(lengths, scale.shapes[model].vocabulary)


def seed_pairs(scale: Scale, model: str, count: int) -> list[Any]:
    """`seed_rows` as the engine takes them."""
    from qlora_dpo.data.tokenization import TokenizedPair

    rows = seed_rows(scale, model, count)
    return [TokenizedPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


def pair_lengths(pairs: Sequence[Any]) -> PairLengths:
    """The lengths of these pairs, as the plan reads them."""
    import numpy as np

    from qlora_dpo.training.memory.levels import PairLengths

    columns = zip(*((len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs), strict=True)
    return PairLengths(*(np.array(column) for column in columns))


@dataclass(frozen=True)
class PairSource:
    """What `train` asks of its data when it chooses levels: the lengths of the pairs that it trains on."""

    pairs: Sequence[Any]

    @property
    def sources(self) -> list[PairSource]:
        """This one."""
        return [self]

    @property
    def train(self) -> range:
        """All pairs."""
        return range(len(self.pairs))

    def lengths(self) -> tuple[Any, ...]:
        """Arrays of the tokens of prompts, chosen and rejected answers."""
        lengths = pair_lengths(self.pairs)
        return lengths.prompt, lengths.chosen, lengths.rejected
