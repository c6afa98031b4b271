"""Rewards, margins, ranks and means from log-probs in a store, against numbers made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny import IdPair, random_pairs

from qlora_dpo.errors import StorageError
from qlora_dpo.reference.fill import keys_of
from qlora_dpo.reference.implicit_rewards import Scored, read_scores
from qlora_dpo.reference.store import ModelIdentity, ModelRows, ReferenceStore

BASE, POLICY = (ModelIdentity(digit * 64, {"model": digit}) for digit in "ab")


def scored(policy: bool = True) -> Scored:
    reference = np.array([[-10.0, -8.0], [-6.0, -9.0], [-4.0, -4.0], [-2.0, -3.0]])
    trained = np.array([[-8.0, -10.0], [-8.0, -5.0], [-4.0, -4.0], [-1.0, -3.0]])
    tokens = np.array([[5, 4], [3, 3], [2, 4], [1, 1]])
    return Scored(reference, trained if policy else None, tokens, beta=0.5)


def test_rewards_margins_and_ranks() -> None:
    found = scored()
    assert found.rewards is not None and found.rewards.tolist() == [[1, -1], [-1, 2], [0, 0], [0.5, 0]]
    assert found.margins.tolist() == [2, -3, 0, 0.5]
    assert found.most_suspicious.tolist() == [1, 2, 3, 0] and found.suspicion_ranks.tolist() == [4, 1, 2, 3]
    columns = found.columns()
    assert columns["policy_chosen_logp_per_token"].tolist() == pytest.approx([-1.6, -8 / 3, -2, -1])
    assert columns["reference_rejected_logp_per_token"].tolist() == pytest.approx([-2, -3, -1, -3])
    assert columns["rejected_tokens"].tolist() == [4, 3, 4, 1] and columns["margin"].tolist() == [2, -3, 0, 0.5]


def test_means_have_the_names_of_training_and_go_by_category() -> None:
    means = scored().means()
    assert means["count"] == 4 and means["rewards/accuracies"] == 0.5 and means["rewards/margins"] == -0.125
    assert means["rewards/chosen"] == 0.125 and means["rewards/rejected"] == 0.25
    found = scored().by_category(["math", None, "math", "math"])
    assert list(found) == ["math", "none"]
    assert found["math"]["count"] == 3 and found["math"]["rewards/margins"] == pytest.approx(2.5 / 3)
    assert found["none"]["rewards/accuracies"] == 0
    assert scored().by_category(["math"] * 4) == {}


@pytest.mark.parametrize(
    ("right", "wrong", "ties", "knows"),
    [(59, 41, 0, False), (61, 39, 0, True), (9, 0, 0, True), (3, 0, 0, False), (0, 0, 100, False), (20, 80, 0, False)],
)
def test_an_adapter_that_is_no_better_than_chance_knows_nothing(right: int, wrong: int, ties: int, knows: bool) -> None:
    chosen = np.repeat([1.0, -1.0, 0.0], [right, wrong, ties])
    sides = np.stack([chosen, np.zeros_like(chosen)], axis=1)
    found = Scored(np.zeros_like(sides), sides, np.ones(sides.shape, np.int64), beta=0.1)
    assert found.knows_nothing is not knows
    low, high = found.accuracy_interval
    assert low < (right + ties / 2) / len(chosen) <= high
    assert not scored(policy=False).knows_nothing  # there is no adapter that could have learned from labels


def test_without_a_policy_the_margin_is_of_log_probs_per_token() -> None:
    found = scored(policy=False)
    assert found.rewards is None and found.margin_of == "reference_logps_per_token"
    assert found.margins.tolist() == pytest.approx([0, 1, -1, 1])
    assert "chosen_reward" not in found.columns() and "policy_chosen_logp_per_token" not in found.columns()
    assert found.means()["accuracies"] == 0.5 and "rewards/margins" not in found.means()


def filled(rows: ModelRows, pairs: list[IdPair], per_token: float) -> None:
    for pair in pairs:
        for key, ids in zip(keys_of(pair), (pair.chosen_ids, pair.rejected_ids), strict=True):
            rows.put({key: np.full(len(ids), per_token, np.float32)})


def test_sums_are_read_from_the_store_and_a_lost_row_is_no_zero(tmp_path: Path) -> None:
    pairs = random_pairs([(3, 4, 2), (5, 1, 6)])
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        base, policy = store.of(BASE), store.of(POLICY)
        filled(base, pairs, -1.0)
        filled(policy, pairs, -0.5)
        found = read_scores(pairs, base, policy, beta=0.1)
        assert found.tokens.tolist() == [[4, 2], [1, 6]] and found.reference.tolist() == [[-4, -2], [-1, -6]]
        assert found.margins.tolist() == pytest.approx([0.1, -0.25])
        policy.discard([keys_of(pairs[1])[0]])
        with pytest.raises(StorageError, match="has lost 1 rows"):
            read_scores(pairs, base, policy, beta=0.1)
