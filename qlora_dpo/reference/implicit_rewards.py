"""Implicit rewards: how much likelier an answer is under the policy than under its reference, and which rows of a data
set the policy disagrees with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.packing import Pair
from qlora_dpo.errors import StorageError
from qlora_dpo.reference.fill import AT_ONCE, keys_of
from qlora_dpo.reference.intervals import Interval, wilson
from qlora_dpo.reference.store import ModelRows

Sides = NDArray[np.float64]
"""[pairs, 2]: chosen, rejected."""

CHANCE = 0.5  # share of labels that a coin agrees with
OF_REWARDS, OF_MODEL = "rewards", "reference_logps_per_token"


@dataclass(frozen=True)
class Scored:
    """Log-probs of the answers of pairs, summed over their tokens."""

    reference: Sides
    policy: Sides | None
    """None where there is no adapter: the model itself is looked at then."""
    tokens: NDArray[np.int64]
    """[pairs, 2]."""
    beta: float

    @property
    def margin_of(self) -> str:
        """What the margins are differences of."""
        return OF_MODEL if self.policy is None else OF_REWARDS

    @cached_property
    def rewards(self) -> Sides | None:
        """beta * log(pi / pi_ref) of whole answers (arXiv 2305.18290, section 4)."""
        return None if self.policy is None else self.beta * (self.policy - self.reference)

    @cached_property
    def margins(self) -> NDArray[np.float64]:
        """How much the chosen answer is preferred [pairs]: the difference of the rewards, or without an adapter of the
        log-probs per token."""
        of = self.reference / self.tokens if self.rewards is None else self.rewards
        return of[:, 0] - of[:, 1]

    @cached_property
    def accuracy_interval(self) -> Interval:
        """95 % interval of the share of pairs whose chosen answer is preferred; a margin of 0 is half a one."""
        return wilson(float((self.margins > 0).sum() + (self.margins == 0).sum() / 2), len(self.margins))

    @property
    def knows_nothing(self) -> bool:
        """An adapter that agrees with the labels no better than chance, which then cannot tell which of them are
        wrong."""
        return self.policy is not None and self.accuracy_interval[0] <= CHANCE

    @cached_property
    def most_suspicious(self) -> NDArray[np.int64]:
        """The places of the pairs, that with the lowest margin first."""
        return np.argsort(self.margins, kind="stable")

    @cached_property
    def suspicion_ranks(self) -> NDArray[np.int64]:
        """[pairs]: 1 for the lowest margin."""
        ranks = np.empty(len(self.margins), np.int64)
        ranks[self.most_suspicious] = np.arange(1, len(ranks) + 1)
        return ranks

    def columns(self) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        """The numbers of each pair, by the names that they have in files."""
        found: dict[str, NDArray[np.float64] | NDArray[np.int64]] = {
            "margin": self.margins,
            "suspicion_rank": self.suspicion_ranks,
        }
        for side, name in enumerate(("chosen", "rejected")):
            tokens = self.tokens[:, side]
            if self.rewards is not None and self.policy is not None:
                found[f"{name}_reward"] = self.rewards[:, side]
                found[f"policy_{name}_logp_per_token"] = self.policy[:, side] / tokens
            found[f"reference_{name}_logp_per_token"] = self.reference[:, side] / tokens
            found[f"{name}_tokens"] = tokens
        return found

    def means(self, members: NDArray[np.bool_] | None = None) -> dict[str, float]:
        """The count of pairs and the means over them, under the names that training logs; of `members` only, where
        given."""
        of = np.ones(len(self.margins), np.bool_) if members is None else members
        found: dict[str, float] = {"count": int(of.sum())}
        if self.rewards is not None:
            found["rewards/chosen"], found["rewards/rejected"] = self.rewards[of].mean(0).tolist()
        per_token = (self.reference if self.policy is None else self.policy)[of] / self.tokens[of]
        prefix = "" if self.policy is None else "rewards/"
        return found | {
            f"{prefix}accuracies": float((self.margins[of] > 0).mean()),
            f"{prefix}margins": float(self.margins[of].mean()),
            "logps_per_token/chosen": float(per_token[:, 0].mean()),
            "logps_per_token/rejected": float(per_token[:, 1].mean()),
        }

    def by_category(self, categories: Sequence[str | None]) -> dict[str, dict[str, float]]:
        """The means of each category, that with most pairs first; nothing where there are not two."""
        names = np.array(["none" if category is None else category for category in categories], dtype=object)
        found, counts = np.unique(names.astype(str), return_counts=True)
        if len(found) < 2:
            return {}
        most_first = sorted(zip(found.tolist(), counts.tolist(), strict=True), key=lambda entry: (-entry[1], entry[0]))
        return {name: self.means(names == name) for name, _ in most_first}


def read_scores(pairs: Sequence[Pair], reference: ModelRows, policy: ModelRows | None, beta: float) -> Scored:
    """The scores of pairs whose log-probs are in a store.

    Raises:
        StorageError: one is missing or damaged.
    """
    tokens = np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs], np.int64)
    return Scored(_sums(pairs, reference), None if policy is None else _sums(pairs, policy), tokens, beta)


def _sums(pairs: Sequence[Pair], rows: ModelRows) -> Sides:
    """The log-probs of whole answers."""
    sums: list[float] = []
    for start in range(0, len(pairs), AT_ONCE):
        keys = [key for place in range(start, min(start + AT_ONCE, len(pairs))) for key in keys_of(pairs[place])]
        found = rows.get(list(dict.fromkeys(keys)))
        missing = len(set(keys) - found.keys())
        if missing:
            raise StorageError(
                f"{rows.store.path} has lost {missing:,} rows since they were computed. Run the same command again: "
                "they are computed anew."
            )
        sums += [found[key].sum(dtype=np.float64) for key in keys]
    return np.array(sums, np.float64).reshape(-1, 2)
