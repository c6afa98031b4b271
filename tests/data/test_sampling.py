"""Every row floor or ceiling of its rate times, as many rows in every epoch, drawn anew by seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from qlora_dpo.data.mixtures.sampling import LEFT_OUT, Sampler

RATES = [1.5, 0.3, 1.0, 0.0, 2.25, 0.3]
SIZES = [40, 33, 20, 5, 7, 1]


def groups(sizes: Sequence[int] = SIZES) -> NDArray[np.int64]:
    """Groups of these sizes, their rows mixed, and a few rows of none."""
    rows = np.repeat(np.arange(len(sizes)), sizes).tolist() + [LEFT_OUT] * 4
    return np.array(rows)[np.random.default_rng(0).permutation(len(rows))]


@pytest.mark.parametrize("epoch", range(5))
def test_every_row_is_taken_floor_or_ceiling_of_its_rate_times(epoch: int) -> None:
    rows = groups()
    times = Sampler(rows, RATES, seed=1).times(epoch)
    for row, taken in zip(rows, times, strict=True):
        rate = 0 if row == LEFT_OUT else RATES[row]
        assert math.floor(rate) <= taken <= math.ceil(rate)


def test_every_epoch_has_as_many_rows_and_other_ones() -> None:
    sampler = Sampler(groups(), RATES, seed=1)
    epochs = [sampler.epoch(number) for number in range(20)]
    # 60 + 9.9 + 20 + 0 + 15.75 + 0.3
    assert {len(epoch) for epoch in epochs} == {len(sampler)} == {106}
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_groups_stay_within_one_row_of_their_share() -> None:
    rows = groups()
    sampler = Sampler(rows, RATES, seed=1)
    for epoch in range(20):
        for group, (rate, size) in enumerate(zip(RATES, SIZES, strict=True)):
            taken = sampler.times(epoch)[rows == group].sum()
            assert math.floor(rate * size) <= taken <= math.ceil(rate * size)


def test_a_single_row_comes_as_often_as_its_rate_says() -> None:
    sampler = Sampler(groups(), RATES, seed=1)
    place = int(np.flatnonzero(groups() == 5)[0])
    mean = np.mean([sampler.times(epoch) for epoch in range(1000)], axis=0)
    assert mean[place] == pytest.approx(0.3, abs=0.1)
    assert mean[groups() == 0] == pytest.approx(1.5, abs=0.1)


def test_rates_are_the_decimal_numbers_that_were_written() -> None:
    # 100 x 0.29 is 29 rows in every epoch; in floats it is 28.999999999999996, and a row would go to the other group
    rows = groups([100, 4])
    sampler = Sampler(rows, [0.29, 0.1], seed=0)
    assert {int(sampler.times(epoch)[rows == 0].sum()) for epoch in range(20)} == {29}


def test_rows_of_a_seed_and_an_epoch_are_the_same_on_any_machine() -> None:
    rows = np.array([0] * 8 + [1] * 8)
    sampler = Sampler(rows, [0.5, 1.25], seed=42)
    assert sampler.epoch(0) == [1, 2, 4, 7, 8, 9, 10, 11, 11, 12, 12, 13, 14, 15]
    assert sampler.epoch(1) == [0, 1, 5, 6, 8, 9, 10, 11, 11, 12, 13, 13, 14, 15]
    assert Sampler(rows, [0.5, 1.25], seed=43).epoch(0) != sampler.epoch(0)


def test_nothing_is_drawn_from_nothing() -> None:
    assert Sampler(np.empty(0, np.int64), [], seed=0).epoch(0) == []
    assert len(Sampler(np.array([LEFT_OUT, LEFT_OUT]), [1.0], seed=0)) == 0
