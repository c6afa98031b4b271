"""Filling ahead: every pair once, in any number of parts, in micro-batches that fit; a stopped fill goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import IdPair, random_pairs

from qlora_dpo.data.packing import PackedBatch, batch_cost
from qlora_dpo.errors import UsageError
from qlora_dpo.reference import fill as fill_module
from qlora_dpo.reference.fill import LocalWay, Shard, Way, fill, keys_of
from qlora_dpo.reference.store import ModelIdentity, ReferenceStore

MODEL = ModelIdentity("a" * 64, {"model": "made"})
CPU = torch.device("cpu")


def pairs(count: int = 50) -> list[IdPair]:
    generator = torch.Generator().manual_seed(5)
    made = random_pairs([tuple(row) for row in torch.randint(1, 14, (count - 1, 3), generator=generator).tolist()])
    return [*made, made[3]]


class Device:
    """Scores every token by its id, with memory for `capacity` tokens."""

    def __init__(self, capacity: float = float("inf"), stop_at: int = 10_000) -> None:
        self.capacity, self.stop_at = capacity, stop_at
        self.tokens: list[int] = []

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        if len(self.tokens) == self.stop_at:
            raise KeyboardInterrupt
        self.tokens.append(batch.input_ids.numel())
        if batch.input_ids.numel() > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return -batch.target_ids.float() / 100


def way(device: Device, max_tokens: int, kind: Any = "shared", rows: list[IdPair] | None = None) -> Way:
    return Way(MODEL, LocalWay(device, rows or pairs(), kind=kind, device=CPU, max_tokens=max_tokens))


def assert_filled(store: ReferenceStore, rows: list[IdPair]) -> None:
    found = store.of(MODEL).get([key for pair in rows for key in keys_of(pair)])
    for pair in rows:
        for key, ids in zip(keys_of(pair), (pair.chosen_ids, pair.rejected_ids), strict=True):
            assert np.array_equal(found[key], -np.array(ids, np.float32) / 100)


@pytest.mark.parametrize("window", [7, 1024])
@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("kind", ["shared", "padded"])
def test_all_pairs_get_their_own_values_within_the_budget(
    kind: Any, max_tokens: int, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fill_module, "WINDOW", window)
    device = Device()
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        assert fill(pairs(), store.of(MODEL), way(device, max_tokens, kind), Shard()) == (50, 50)
        assert_filled(store, pairs())
        longest = max(batch_cost([pair], kind) for pair in pairs())
        assert max(device.tokens) <= max(max_tokens, longest)
        if max_tokens == 10_000 and window == 1024:
            assert len(device.tokens) == 1
        assert fill(pairs(), store.of(MODEL), way(device, max_tokens, kind), Shard()) == (0, 50)


def test_memory_that_runs_out_halves_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = Device(capacity=200)
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        fill(pairs(), store.of(MODEL), way(device, 10_000), Shard())
        assert_filled(store, pairs())
    failed = [tokens for tokens in device.tokens if tokens > 200]
    assert failed == device.tokens[: len(failed)] and len(failed) >= 2
    assert capsys.readouterr().err.count("out of memory") == len(failed)


def test_pair_that_does_not_fit_alone_ends_it(tmp_path: Path) -> None:
    with (
        ReferenceStore.open(tmp_path / "store.sqlite") as store,
        pytest.raises(torch.OutOfMemoryError, match="tokens do"),
    ):
        fill(pairs(), store.of(MODEL), way(Device(capacity=20), 10_000), Shard())


def test_stopped_fill_goes_on_where_it_was(tmp_path: Path) -> None:
    path, whole = tmp_path / "store.sqlite", Device()
    with ReferenceStore.open(tmp_path / "other.sqlite") as store:
        fill(pairs(), store.of(MODEL), way(whole, 100), Shard())
    first, second = Device(stop_at=4), Device()
    with ReferenceStore.open(path) as store, pytest.raises(KeyboardInterrupt):
        fill(pairs(), store.of(MODEL), way(first, 100), Shard())
    with ReferenceStore.open(path) as store:
        computed, found = fill(pairs(), store.of(MODEL), way(second, 100), Shard())
        assert_filled(store, pairs())
    assert sum(first.tokens) + sum(second.tokens) == sum(whole.tokens) and 0 < computed < found == 50


def test_damaged_rows_are_filled_again(tmp_path: Path) -> None:
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        fill(pairs(), store.of(MODEL), way(Device(), 100), Shard())
        with store.writing() as connection:
            connection.execute("UPDATE logps SET crc = 0 WHERE key = ?", (keys_of(pairs()[9])[1],))
        assert fill(pairs(), store.of(MODEL), way(Device(), 100), Shard()) == (1, 50)
        assert_filled(store, pairs())


@pytest.mark.parametrize("of", [1, 2, 5])
def test_parts_share_the_pairs_out(of: int, tmp_path: Path) -> None:
    computed = []
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        for number in range(1, of + 1):
            computed.append(fill(pairs(), store.of(MODEL), way(Device(), 100), Shard.parse(f"{number}/{of}")))
        assert_filled(store, pairs())
    assert sum(found for _, found in computed) == sum(done for done, _ in computed) == 50
    assert all(0 < done < 50 for done, _ in computed) or of == 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "1/2/3", "-1/2", ""])
def test_parts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"such as 1/2 and 2/2"):
        Shard.parse(text)
