"""The adapter alone: it loads in plain PEFT, says what it is for, and nothing else is in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_dpo.cli import main
from qlora_dpo.training.folder.run_folder import RunFolder


def export(folder: Path, output: Path, *options: str) -> int:
    return main(["release", "adapter", str(folder), "--output", str(output), *options])


def test_the_folder_holds_the_adapter_and_what_it_needs(short_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "adapter"
    assert export(short_run, output, "--base_model", "org/base") == 0
    assert {path.name for path in output.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "base_quantization.json", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "README.md",
    }  # fmt: skip
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", None)
    held = json.loads((output / "base_quantization.json").read_text())
    assert (held["base_model"], held["quantization"], held["dtype"]) == ("org/base", None, "float32")
    assert "org/base" in (output / "README.md").read_text()
    base = json.loads((short_run / "adapter_config.json").read_text())["base_model_name_or_path"]
    ids = torch.tensor([[1, 5, 9, 12]])
    expected, found = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))(ids).logits
        for folder in (short_run, output)
    )
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(short_run).chat_template


def test_another_type_is_stored_when_asked_for(short_run: Path, tmp_path: Path) -> None:
    assert export(short_run, tmp_path / "small", "--dtype", "bfloat16") == 0
    tensors, own = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "small", short_run))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, own[name].bfloat16(), atol=0, rtol=0)


def test_how_a_quantized_base_was_held_can_be_used_as_it_stands(
    short_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BitsAndBytesConfig

    text = (short_run / "config.yaml").read_text()
    (short_run / "config.yaml").write_text(text.replace("load_in_4bit: false", "load_in_4bit: true"))
    try:
        assert export(short_run, tmp_path / "adapter") == 0
    finally:
        (short_run / "config.yaml").write_text(text)
    held = json.loads((tmp_path / "adapter" / "base_quantization.json").read_text())
    config = BitsAndBytesConfig(**held["quantization"])
    assert config.load_in_4bit
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.float32)


def test_bad_input_is_named(
    short_run: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(code: int, folder: Path, output: Path) -> str:
        assert export(folder, output) == code
        return capsys.readouterr().err

    assert "no adapter_config.json" in error_of(74, tmp_path / "absent", tmp_path / "out")
    assert "is a whole model, not an adapter" in error_of(65, model_folder, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert "is in use" in error_of(2, short_run, tmp_path / "taken")
    status = RunFolder(short_run).status()
    RunFolder(short_run).update_status(status="training")
    try:
        assert "has not finished" in error_of(2, short_run, tmp_path / "out")
        assert export(short_run, tmp_path / "out", "--allow_unfinished") == 0
    finally:
        RunFolder(short_run).update_status(**status)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
