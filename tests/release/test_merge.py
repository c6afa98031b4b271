"""Laws 8 and 9: the merged model is the trained one, and what is written loads in plain PEFT and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RAGGED, random_pairs

from qlora_dpo.cli import main
from qlora_dpo.training.folder.run_folder import RunFolder


@pytest.fixture(scope="module", params=["4bit", "8bit", "none"])
def finished_run(request: pytest.FixtureRequest, model_folder: Path, pairs_file: Path, tmp_path_factory: Any) -> Path:
    """A run long enough that the adapter matters."""
    out = tmp_path_factory.mktemp("runs") / str(request.param)
    quantization = {"4bit": [], "8bit": ["--load_in_8bit"], "none": ["--load_in_4bit", "false"]}[request.param]
    arguments = [
        "--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", out, "--dtype", "float32",
        "--max_steps", "6", "--learning_rate", "0.02", "--gradient_accumulation_steps", "4", "--lora_r", "4",
        *quantization,
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    return out


@pytest.fixture
def merged(finished_run: Path, tmp_path: Path) -> Path:
    arguments = ["--adapter", finished_run, "--output", tmp_path / "merged", "--dtype", "float32"]
    assert main(["merge", *map(str, arguments)]) == 0
    return tmp_path / "merged"


def logps(model: Any) -> torch.Tensor:
    """Log-probs of made completions, by plain transformers."""
    rows = [[*pair.prompt_ids, *pair.chosen_ids] for pair in random_pairs(RAGGED)]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]
    return torch.cat([
        scores[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        for scores, row in zip(logits, rows, strict=True)
    ])  # fmt: skip


def plain_peft(run: Path) -> Any:
    """The run's adapter on its base, as any PEFT program would load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = __import__("yaml").safe_load((run / "config.yaml").read_text())
    config = json.loads((run / "adapter_config.json").read_text())
    quantization = None
    if options["load_in_8bit"]:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif options["load_in_4bit"]:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"], quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    # This test compares numbers only; gradients are not needed, but the repacked CPU form would round differently.
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, str(run)).eval()


@pytest.mark.slow
def test_adapter_in_plain_peft_and_merged_folder_in_plain_transformers_agree(finished_run: Path, merged: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = plain_peft(finished_run)
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    trained, exported = logps(adapter), logps(plain)
    # int8 products round the activations too, so only weights are reproduced there
    tolerance = 0.1 if "8bit" in finished_run.name else 1e-4
    assert (trained - exported).abs().max() < tolerance
    with adapter.disable_adapter():
        assert (
            logps(adapter) - exported
        ).abs().max() > 0.3  # the adapter changed something, so agreeing means something
    config = json.loads((merged / "config.json").read_text())
    assert "quantization_config" not in config
    assert (
        AutoTokenizer.from_pretrained(merged).chat_template == AutoTokenizer.from_pretrained(finished_run).chat_template
    )


@pytest.mark.slow
def test_merge_into_the_original_base_is_base_plus_update(finished_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    arguments = ["--adapter", finished_run, "--output", tmp_path / "merged", "--dtype", "float32", "--base", "original"]
    assert main(["merge", *map(str, arguments)]) == 0
    base = json.loads((finished_run / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(finished_run)
    )
    expected = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)


def test_merge_refuses_an_unfinished_run_and_a_folder_in_use(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = RunFolder(finished_run).status()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert main(["merge", "--adapter", str(finished_run), "--output", str(tmp_path / "taken")]) == 2
    RunFolder(finished_run).update_status(status="training")
    try:
        assert main(["merge", "--adapter", str(finished_run), "--output", str(tmp_path / "out")]) == 2
        assert "--allow_unfinished" in capsys.readouterr().err
        arguments = ["--adapter", str(finished_run), "--output", str(tmp_path / "out"), "--allow_unfinished"]
        assert main(["merge", *arguments]) == 0
    finally:
        RunFolder(finished_run).update_status(**status)
    assert (tmp_path / "taken" / "file").read_text() == "mine"


def test_run_folder_holds_what_a_reader_needs(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert {
        "config.yaml", "run.json", "metrics.jsonl", "training_curves.png", "README.md", "adapter_model.safetensors",
        "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "checkpoint-6",
    } <= names  # fmt: skip
    assert (finished_run / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert RunFolder(finished_run).status()["environment"]["torch"] == torch.__version__
