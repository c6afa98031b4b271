"""Levels are chosen so that memory is filled and no more is recomputed than that asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_pairs, tiny_model, with_lora

from qlora_dpo.cli import main
from qlora_dpo.config.checks import train_config
from qlora_dpo.config.training import TrainConfig
from qlora_dpo.data.packing import LayoutKind, batch_cost, cut, pack
from qlora_dpo.errors import ModelError
from qlora_dpo.models.activation_checkpointing import LEVELS, Level
from qlora_dpo.models.memory import Activations, count_activations
from qlora_dpo.models.skeleton import build_skeleton
from qlora_dpo.training.data import load_training_data
from qlora_dpo.training.memory import levels as module
from qlora_dpo.training.memory.levels import (
    PairLengths,
    choose_levels,
    count_as_needed,
    describe,
    largest_micro_batch,
    lengths_of,
    levels_of_run,
    list_of_targets,
    made_pairs,
)

CPU = torch.device("cpu")
KEPT = {"none": 100, "selective": 60, "full": 10, "offload": 0}


def counted(layers: int = 4, levels: Sequence[str] = LEVELS) -> Activations:
    return Activations(
        tokens=1,
        layers={level: (KEPT[level],) * layers for level in levels},  # type: ignore[misc]
        outside=dict.fromkeys(levels, 50),  # type: ignore[arg-type]
        working=dict.fromkeys(levels, 20),  # type: ignore[arg-type]
        head_tile=0,
        host=10,
    )


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (1000, ("none",) * 4),
        (470, ("none",) * 4),
        (469, ("selective", "none", "none", "none")),
        (390, ("selective", "selective", "none", "none")),
        (310, ("selective",) * 4),
        (309, ("full", "selective", "selective", "selective")),
        (110, ("full",) * 4),
        (109, ("offload", "full", "full", "full")),
        (70, ("offload",) * 4),
        (0, ("offload",) * 4),
    ],
)
def test_memory_is_filled_with_two_neighboring_levels(free: int, expected: tuple[Level, ...]) -> None:
    assert choose_levels(counted(), free) == expected


def test_less_memory_never_means_less_recomputation() -> None:
    rank = {level: number for number, level in enumerate(LEVELS)}
    sums = [sum(rank[level] for level in choose_levels(counted(6), free)) for free in range(0, 800, 7)]
    assert sums == sorted(sums, reverse=True)
    for free in range(100, 800, 7):
        assert counted(6).peak(choose_levels(counted(6), free)) <= free


def test_cpu_has_nowhere_to_offload_to() -> None:
    assert choose_levels(counted(levels=LEVELS[:3]), 0) == ("full",) * 4


def test_choice_in_words() -> None:
    assert describe(("full",) * 3) == "full on all 3 layers"
    assert describe(("full", "none", "none")) == "full on 1 layers, none on 2 layers"


@pytest.mark.parametrize("kind", ["shared", "padded"])
def test_largest_micro_batch_is_what_cutting_leads_to(kind: LayoutKind) -> None:
    generator = np.random.default_rng(0)
    shape = [tuple(int(n) for n in row) for row in generator.integers(1, 40, (24, 3))]
    pairs = random_pairs(shape)
    lengths = PairLengths(*np.array(shape, np.int64).T)
    assert lengths.costs(kind).tolist() == [batch_cost([pair], kind) for pair in pairs]
    for budget in (1, 100, 300, 10_000):
        largest = largest_micro_batch(lengths, kind, budget, pairs_per_step=8)
        assert largest <= max(budget, max(lengths.costs(kind)))
        if kind == "shared":
            for start in range(0, 24, 8):
                step = pairs[start : start + 8]
                assert all(batch_cost([step[i] for i in bin], kind) <= largest for bin in cut(step, budget, kind))
    assert largest_micro_batch(None, kind, 777, pairs_per_step=8) == 777


@pytest.mark.parametrize("kind", ["shared", "padded"])
@pytest.mark.parametrize("tokens", [4, 7, 200, 4096, 5001])
def test_made_pairs_have_the_asked_number_of_tokens(kind: LayoutKind, tokens: int) -> None:
    pairs = made_pairs(tokens, kind, (100.0, 150.0, 120.0))
    made = pack(pairs, kind).input_ids.numel()
    assert made == tokens if kind == "shared" else tokens - 2 * len(pairs) <= made <= tokens + 2 * len(pairs)


def run_config(model: Path, pairs: Path, **options: Any) -> TrainConfig:
    return train_config({"model_name_or_path": str(model), "dataset": str(pairs), "dtype": "float32"} | options)


def data_of(config: TrainConfig, model: Path) -> Any:
    from qlora_dpo.models.loading import load_tokenizer

    return load_training_data(config.data, load_tokenizer(str(model)), 0)


def test_run_gets_what_fits(
    model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(model_folder, pairs_file, load_in_4bit=False)
    data = data_of(config, model_folder)
    assert len(lengths_of(data, data.train).prompt) == len(data.train)
    policy = with_lora(tiny_model())
    state = torch.get_rng_state()
    assert levels_of_run(config, policy, "shared", data, CPU) == ("none", "none")
    assert "none on all 2 layers" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr(module, "available_cpu_memory", lambda: 0)
    assert levels_of_run(config, policy, "shared", data, CPU) == ("full", "full")
    assert "more than is free" in capsys.readouterr().err


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_what_is_counted_as_needed_leads_to_the_same_choice(device_type: str) -> None:
    config = tiny_model().config
    skeleton = build_skeleton(config, quantization=None, dtype=torch.float32, r=4, target_modules=["all-linear"])
    pairs = random_pairs([(30, 20, 20)] * 4)
    whole = count_activations(skeleton, pairs, "shared", device_type)
    most = whole.peak(("none",) * len(skeleton.kinds))
    chosen = set()
    for free in (0, whole.peak(("full",) * len(skeleton.kinds)), most - 1, most, 2 * most):
        counted = count_as_needed(skeleton, pairs, "shared", device_type, free)
        assert choose_levels(counted, free) == choose_levels(whole, free)
        assert counted.layers.keys() == ({"none"} if free >= most else whole.layers.keys())
        chosen.add(choose_levels(counted, free))
    assert len(chosen) > 2


def test_level_that_was_asked_for_is_taken(model_folder: Path, pairs_file: Path) -> None:
    config = run_config(model_folder, pairs_file, activation_checkpointing="offload")
    assert levels_of_run(config, None, "shared", data_of(config, model_folder), CPU) == "offload"


def test_architecture_that_cannot_be_counted_trains_with_a_word(
    model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> Activations:
        raise ModelError("it needs data.")

    monkeypatch.setattr(module, "count_activations", refuse)
    config = run_config(model_folder, pairs_file, load_in_4bit=False)
    assert levels_of_run(config, with_lora(tiny_model()), "shared", data_of(config, model_folder), CPU) == "selective"
    assert "it needs data" in capsys.readouterr().err


def test_pattern_of_target_modules_is_refused() -> None:
    assert list_of_targets({"v_proj", "q_proj"}) == ["q_proj", "v_proj"]
    with pytest.raises(ModelError, match="pattern"):
        list_of_targets(".*_proj")


@pytest.mark.parametrize("level", ["auto", "offload"])
def test_train_takes_every_level(
    level: str, model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", tmp_path / "run"]
    options = ["--max_steps", "2", "--dtype", "float32", "--activation_checkpointing", level]
    assert main(["train", *map(str, arguments), *options]) == 0
    assert ("Activation checkpointing: none on all 2 layers" in capsys.readouterr().err) == (level == "auto")
