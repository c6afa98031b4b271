"""The train command with its options: a frozen SFT adapter as reference, mirrors, samples, held-out pairs."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, with_lora

from qlora_dpo.cli import main
from qlora_dpo.models.lora import (
    REFERENCE,
    add_frozen_reference,
    load_adapter,
    reference_active,
    save_adapter,
    trainable_parameters,
)
from qlora_dpo.training.records.mirrors import Mirror
from qlora_dpo.training.records.tracking import Recorder, read_metrics


def train(model: Path, pairs: Path, out: Path, *more: str | Path) -> int:
    options = [
        "--dtype",
        "float32",
        "--max_steps",
        "4",
        "--gradient_accumulation_steps",
        "4",
        "--learning_rate",
        "0.01",
    ]
    arguments = ["--model_name_or_path", model, "--dataset", pairs, "--output_dir", out, *options, *more]
    return main(["train", *map(str, arguments)])


@pytest.fixture
def sft_adapter(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "sft"
    folder.mkdir()
    save_adapter(with_lora(tiny_model(), r=4), folder)
    return folder


def test_policy_starts_from_the_reference_adapter_and_the_reference_stays(
    sft_adapter: Path, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    before = load_file(sft_adapter / "adapter_model.safetensors")
    assert train(model_folder, pairs_file, tmp_path / "run", "--reference_model", sft_adapter) == 0
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert abs(first["loss"] - math.log(2)) < 1e-6 and first["rewards/chosen"] == 0
    after = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert 0 < min(moved) and max(moved) < 0.1  # it went on from the SFT adapter, not from zero
    assert all(torch.equal(load_file(sft_adapter / "adapter_model.safetensors")[name], before[name]) for name in before)


def test_a_reference_of_another_base_is_refused_by_the_fingerprint_that_its_run_noted(
    sft_adapter: Path, model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {"status": "finished", "run_id": "1", "content": {"model_name_or_path": "f" * 96}}
    (sft_adapter / "run.json").write_text(json.dumps(status))
    checkpoint = sft_adapter / "checkpoint-2"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(sft_adapter / name, checkpoint)
    for adapter in (sft_adapter, checkpoint):
        assert train(model_folder, pairs_file, tmp_path / "run", "--reference_model", adapter) == 65
        told = capsys.readouterr().err
        assert f"{model_folder} is not the base that {adapter} was trained on" in told and "noted ffffffffffff" in told
    (sft_adapter / "run.json").unlink()
    renamed = json.loads((sft_adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/other"}
    (sft_adapter / "adapter_config.json").write_text(json.dumps(renamed))
    assert train(model_folder, pairs_file, tmp_path / "run", "--reference_model", sft_adapter) == 0
    assert f"{sft_adapter} names org/other as its base, and here it is put on {model_folder}" in capsys.readouterr().err


def test_reference_is_the_frozen_adapter_while_it_is_active(sft_adapter: Path) -> None:
    model = load_adapter(tiny_model(), sft_adapter, trainable=True)
    add_frozen_reference(model, sft_adapter)
    ids = torch.tensor([[1, 5, 6, 7]])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = logits()
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.05)
    assert not torch.allclose(logits(), expected, atol=1e-3)
    with reference_active(model):
        torch.testing.assert_close(logits(), expected)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all(REFERENCE not in name for name in trainable)
    assert len(trainable) == len(trainable_parameters(model))


def test_base_named_as_reference_means_adapter_off(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    assert train(model_folder, pairs_file, tmp_path / "run", "--reference_model", model_folder) == 0


@pytest.mark.slow
def test_mirrors_and_samples(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    samples = ["--sample_generate", "--max_new_tokens", "5", "--eval_steps", "2", "--eval_fraction", "0.2"]
    assert train(model_folder, pairs_file, out, "--report_to", "wandb", "tensorboard", *samples) == 0
    assert list((out / "tensorboard").glob("events*")) and list((out / "wandb").glob("offline-run-*"))
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4}
    assert len({row["before"] for row in rows if row["prompt"] == rows[0]["prompt"]}) == 1
    assert "before:" in capsys.readouterr().out
    metrics = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in metrics if "eval_loss" in row] == [2, 4]
    assert {"loss", "rewards/accuracies", "rewards/margins", "grad_norm", "pairs_per_second"} <= metrics[0].keys()


@pytest.mark.slow
def test_held_out_pairs_come_from_a_file_or_a_split(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = pairs_file.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:30]))
    (folder / "test.jsonl").write_text("".join(rows[30:]))
    assert train(model_folder, folder, tmp_path / "split", "--eval_split", "test") == 0
    known = ("--eval_dataset", folder / "test.jsonl", "--lint", "warn")  # these pairs are trained on too
    assert train(model_folder, pairs_file, tmp_path / "file", *known) == 0
    assert "30 pairs to train on, 10 held out" in (tmp_path / "split" / "README.md").read_text()
    assert "40 pairs to train on, 10 held out" in (tmp_path / "file" / "README.md").read_text()


class Broken:
    """A mirror that fails at its second line."""

    def __init__(self) -> None:
        self.lines = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.lines += 1
        if self.lines == 2:
            raise ConnectionError("no route")

    def show_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        raise AssertionError("there are none")

    def finish(self) -> None:
        raise AssertionError("a dropped mirror is told nothing more")


def test_failing_mirror_is_dropped_and_the_record_goes_on(tmp_path: Path, caplog: Any) -> None:
    tracker = Broken()
    recorder = Recorder(tmp_path / "metrics.jsonl", [Mirror("broken", lambda: tracker)])
    for step in range(1, 5):
        recorder.log(step, {"loss": 0.5})
    recorder.finish()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    assert tracker.lines == 2 and caplog.text.count("no route") == 1


@pytest.mark.slow
def test_what_became_of_the_data_is_in_the_folder(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(pairs_file.read_text() + '{"prompt": "w3", "chosen": "w4"}\n')
    options = ("--bad_rows", "skip", "--eval_fraction", "0.2", "--lint", "warn")
    assert train(model_folder, file, tmp_path / "run", *options) == 0
    found = json.loads((tmp_path / "run" / "data.json").read_text())
    assert found["train"] + found["held_out"] == 40 and found["held_out"] > 0
    (source,) = found["sources"]
    assert (source["rows_read"], source["pairs"], sum(source["refused"].values())) == (41, 40, 1)
    assert found["lint"]["pairs"] == 40
