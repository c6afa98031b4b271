"""Whole distributions at the predicting positions: those of the plain model, kept in a file and compared exactly."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from tiny import RAGGED, random_pairs, tiny_model

from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.release.fidelity.distributions import Recorded

ROWS = [
    TokenizedConversation([*pair.prompt_ids, *ids], [len(pair.prompt_ids), len(pair.prompt_ids) + len(ids)])
    for pair in random_pairs(RAGGED)
    for ids in (pair.chosen_ids, pair.rejected_ids)
]


@pytest.fixture
def scratch() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        yield file


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_distributions_are_those_of_the_plain_model(model_type: str, scratch: IO[bytes], tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 128} if model_type == "gpt2" else {}
    model, other = (tiny_model(model_type, seed=seed, **sizes).eval() for seed in (0, 1))
    recorded = Recorded(model, ROWS, scratch, tmp_path)
    found = recorded.compare(other)
    expected, given, kl = [], [], []
    with torch.no_grad():
        for row in ROWS:
            places = [place - 1 for start, end in row.spans for place in range(start, end)]
            ours, theirs = (
                one(input_ids=torch.tensor([row.ids])).logits[0, places].log_softmax(-1) for one in (model, other)
            )
            targets = torch.tensor([row.ids[place + 1] for place in places])[:, None]
            expected.append(ours.gather(1, targets)[:, 0])
            given.append(theirs.gather(1, targets)[:, 0])
            kl.append(torch.nn.functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1))
    np.testing.assert_allclose(recorded.logps, torch.cat(expected), atol=1e-5)
    np.testing.assert_allclose(found.logps, torch.cat(given), atol=1e-5)
    np.testing.assert_allclose(found.kl, torch.cat(kl), atol=1e-5)
    assert np.abs(recorded.compare(model, first=4, alone=True).kl).max() < 1e-6


def test_whole_distributions_are_kept_at_some_positions_of_many(
    scratch: IO[bytes], tmp_path: Path, monkeypatch: Any
) -> None:
    model, other = tiny_model(seed=0).eval(), tiny_model(seed=1).eval()
    whole = Recorded(model, ROWS, scratch, tmp_path).compare(other).kl
    monkeypatch.setattr("qlora_dpo.release.fidelity.distributions.KEPT", 7)
    recorded = Recorded(model, ROWS, scratch, tmp_path)
    places = np.linspace(0, len(whole) - 1, 7).round().astype(int)
    np.testing.assert_allclose(recorded.compare(other).kl, whole[places], atol=1e-6)
    assert len(recorded.compare(other, first=2).kl) == sum(places < sum(recorded.lengths[:2]))


def test_full_disk_is_found_before_anything_is_written(scratch: IO[bytes], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 100, 100))
    with pytest.raises(StorageError, match="measuring what the merge keeps takes"):
        Recorded(tiny_model().eval(), ROWS, scratch, tmp_path)
    assert scratch.tell() == 0


def test_trained_adapter_that_gives_nan_is_an_error(scratch: IO[bytes], tmp_path: Path) -> None:
    model = tiny_model().eval()
    model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(ModelError, match="the trained adapter on its base gives log-probs that are not numbers"):
        Recorded(model, ROWS, scratch, tmp_path)
