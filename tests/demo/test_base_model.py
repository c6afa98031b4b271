"""`train --dataset PAIRS` without a model: that of MODEL_PATH, else the embedded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import COMMANDS, main
from qlora_dpo.command_line import parse
from qlora_dpo.demo.base_model import BASE


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_PATH", raising=False)


def model_of(*line: str) -> Any:
    return parse("x", COMMANDS["train"], list(line))["model_name_or_path"]


def test_a_model_that_is_not_named_is_that_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODEL_PATH", "models/mine")
    assert model_of("--dataset", "a.jsonl") == "models/mine"
    assert capsys.readouterr().err == "No --model_name_or_path: models/mine is trained, that of MODEL_PATH.\n"
    assert model_of("--dataset", "a.jsonl", "--model_name_or_path", "m") == "m"
    assert model_of() is None  # the demo
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_pairs_alone_train_the_embedded_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "法国的首都是哪里？", "chosen": "答案是巴黎。", "rejected": "里昂。"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row | {"prompt": f"{n}？"}) + "\n" for n in range(4)))
    line = ["train", "--dataset", str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "run"), "--max_steps",
            "1", "--num_train_epochs", "3", "--eval_fraction", "0", "--lint", "off", "--lora_r", "4"]  # fmt: skip
    assert main(line) == 0
    assert f"No --model_name_or_path: {BASE} is trained, the embedded base" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
