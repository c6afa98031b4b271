"""A run without a reference computes none, keeps none, and checks none."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import tiny_model, with_lora

from qlora_dpo.cli import main
from qlora_dpo.config.training import DataOptions, LossOptions, ModelOptions, TrainConfig
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.training.memory.prediction import has_frozen_adapter
from qlora_dpo.training.records.tracking import read_metrics


@pytest.fixture
def train(model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def never(*values: object) -> None:
        raise AssertionError("a reference was asked for")

    monkeypatch.setattr("qlora_dpo.reference.local.reference_active", never)
    monkeypatch.setattr("qlora_dpo.training.policy.add_frozen_reference", never)
    monkeypatch.setattr("qlora_dpo.reference.store.ReferenceStore.open", never)

    def run(out: Path, *more: str | Path) -> int:
        options = ["--dtype", "float32", "--max_steps", "3", "--gradient_accumulation_steps", "2"]
        arguments = ["--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", out, *options]
        return main(["train", *map(str, [*arguments, "--learning_rate", "0.01", *more])])

    return run


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_no_reference_is_computed_or_stored(train: Callable[..., int], tmp_path: Path, name: str) -> None:
    assert train(tmp_path / "run", "--loss_type", name) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert all(math.isfinite(row["loss"]) for row in rows) and rows[0]["rewards/chosen"] < 0
    assert not any(key.startswith("displacement") for row in rows for key in row)


def test_a_saved_adapter_is_the_start_alone(train: Callable[..., int], tmp_path: Path) -> None:
    start = tmp_path / "sft"
    start.mkdir()
    save_adapter(with_lora(tiny_model(), r=4), start)
    assert train(tmp_path / "run", "--loss_type", "simpo", "--beta", "2.5", "--reference_model", start) == 0
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, tmp_path / "run"))
    assert {name: tensor.shape for name, tensor in after.items()} == {name: before[name].shape for name in before}


def test_a_plan_counts_no_frozen_copy() -> None:
    def config(loss: LossOptions) -> TrainConfig:
        return TrainConfig(ModelOptions("base", reference_model="sft"), data=DataOptions(dataset="pairs"), loss=loss)

    assert has_frozen_adapter(config(LossOptions()))
    assert not has_frozen_adapter(config(LossOptions(loss_type=("simpo", "sft"))))  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [("--reference_store", "none"), ("--on_displacement", "stop")], ids=str)
def test_options_of_a_reference_are_refused(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    assert train(tmp_path / "run", "--loss_type", "simpo", *option) == 2
    assert f"{option[0]} {option[1]} would be ignored: --loss_type simpo has no reference" in capsys.readouterr().err
