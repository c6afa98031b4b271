"""The same command again continues; a stop leaves a checkpoint; damaged checkpoints are passed over."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import forks
import pytest
import torch
from tiny import random_pairs, tiny_model, with_lora
from training.runs import adapter_weights, make_training, run

from qlora_dpo.cli import main
from qlora_dpo.errors import Interrupted
from qlora_dpo.training.folder.checkpoints import checkpoints, newest_valid
from qlora_dpo.training.loop import fit
from qlora_dpo.training.records.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAIRS = random_pairs([(3, 4, 5), (6, 2, 7), (2, 8, 3), (4, 4, 4), (5, 3, 2), (7, 6, 5), (3, 3, 6)])


def fresh_model(dropout: float) -> object:
    model = with_lora(tiny_model(), zero=True)
    for module in model.modules():
        if type(module).__name__ == "LoraLayer" or hasattr(module, "lora_dropout"):
            module.lora_dropout = torch.nn.ModuleDict({"default": torch.nn.Dropout(dropout)})
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stop_at", [3, 4, 5])  # inside an epoch of 4 steps, at its end, in the next
def test_stopped_and_continued_run_equals_an_unbroken_one(dropout: float, stop_at: int, tmp_path: Path) -> None:
    settings = {"steps": 9, "pairs_per_step": 2, "has_dropout": dropout > 0, "max_tokens": 14}
    unbroken_model = fresh_model(dropout)
    unbroken = run(unbroken_model, PAIRS, tmp_path / "unbroken", **settings)

    training = make_training(fresh_model(dropout), PAIRS, tmp_path / "broken", **settings)
    polls = iter(range(10_000))
    wait_for = 2 * stop_at  # each step of two pairs asks at least once, so this falls inside or between micro-batches

    def check() -> None:
        if next(polls) >= wait_for:
            training.stop.handle(signal.SIGTERM, None)
        type(training.stop).check(training.stop)

    training.stop.check = check  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit(training)
    continued_model = fresh_model(dropout)
    continued = run(continued_model, PAIRS, tmp_path / "broken", **settings)

    assert [row["loss"] for row in continued] == [row["loss"] for row in unbroken]
    assert [row["step"] for row in continued] == list(range(1, 10))
    for ours, expected in zip(adapter_weights(continued_model), adapter_weights(unbroken_model), strict=True):
        assert torch.equal(ours, expected)


def damage(checkpoint: Path, how: str) -> None:
    weights = checkpoint / "adapter_model.safetensors"
    if how == "truncated":
        os.truncate(weights, weights.stat().st_size // 2)
    if how == "flipped":
        content = bytearray(weights.read_bytes())
        content[-5] ^= 1
        weights.write_bytes(content)
    if how == "deleted":
        (checkpoint / "optimizer.pt").unlink()
    if how == "no manifest":
        (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "deleted", "no manifest"])
def test_damaged_checkpoint_is_passed_over_with_its_reason(how: str, tmp_path: Path) -> None:
    run(with_lora(tiny_model(), zero=True), PAIRS, tmp_path, steps=4, save_steps=2)
    assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]
    damage(tmp_path / "checkpoint-4", how)
    found, rejected = newest_valid(tmp_path)
    assert found == tmp_path / "checkpoint-2"
    assert len(rejected) == 1 and "checkpoint-4" in rejected[0]


def test_half_written_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".staging-checkpoint-7").mkdir()
    assert checkpoints(tmp_path) == []


def command(model: Path, pairs: Path, out: Path, *more: str) -> list[str]:
    options = ["--max_steps", "6", "--gradient_accumulation_steps", "4", "--save_steps", "2", "--dtype", "float32"]
    return [
        "train",
        "--model_name_or_path",
        str(model),
        "--dataset",
        str(pairs),
        "--output_dir",
        str(out),
        *options,
        *more,
    ]


@pytest.mark.slow
def test_same_command_again_continues_then_says_it_is_finished(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(command(model_folder, pairs_file, out)) == 0
    capsys.readouterr()
    assert main(command(model_folder, pairs_file, out)) == 0
    assert "is finished" in capsys.readouterr().err
    assert main(command(model_folder, pairs_file, out, "--beta", "0.2")) == 2
    assert "beta: was 0.1, now 0.2" in capsys.readouterr().err
    assert main(command(model_folder, pairs_file, out, "--beta", "0.2", "--fresh")) == 0


@pytest.mark.slow
def test_a_finished_run_with_more_steps_ends_as_one_that_had_them_from_the_start(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    constant = ("--lr_scheduler_type", "constant", "--reference_store", "none")
    for name, more in (
        ("whole", ()), ("grown", ("--max_steps", "4")), ("grown", ("--allow_changed", "max_steps")),
    ):  # fmt: skip
        assert main(command(model_folder, pairs_file, tmp_path / name, *constant, *more)) == 0
    whole, grown = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "grown"))
    assert [row["step"] for row in grown] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in grown] == [row["loss"] for row in whole]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "grown")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_exit_code_75(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = command(model_folder, pairs_file, out, "--max_steps", "5000", "--save_steps", "5000")
    process = forks.Command(arguments, tmp_path / "log")
    deadline = time.monotonic() + 120
    while len(read_metrics(out / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, (tmp_path / "log").read_text()
    found, rejected = newest_valid(out)
    assert found is not None and not rejected
    assert json.loads((out / "run.json").read_text())["status"] == "training"
    assert not (out / "adapter_model.safetensors").exists()
