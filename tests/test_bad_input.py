"""A user's mistake gives one clear sentence and the right exit code, and leaves nothing half-written behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from qlora_dpo.cli import main

USAGE, DATA, FILES, MACHINE = 2, 65, 74, 71


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def train(*arguments: str | Path) -> int:
    return main(["train", "--dtype", "float32", *map(str, arguments)])


def check(code: int, expected: int, err: str, *parts: str) -> None:
    assert code == expected, err
    assert "Traceback" not in err
    last = err[err.index("error: ") :]
    for part in parts:
        assert part in last, last


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--beat", "0.5"], ["--beat", "--beta"]),
        (["--source_max_len", "600"], ["--max_length", "--max_prompt_length"]),
        (["--target_max_len", "600"], ["--max_length", "--max_prompt_length"]),
        (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
        (["--beta", "-1"], ["--beta"]),
        (["--loss_type", "sigmoyd"], ["sigmoyd", "sigmoid"]),
        (["--max_length", "100", "--max_prompt_length", "200"], ["--max_prompt_length 200", "100"]),
        (["--label_smoothing", "0.1", "--loss_type", "ipo"], ["label_smoothing", "ipo"]),
        (["--load_in_4bit", "false", "--bnb_4bit_quant_type", "fp4"], ["--bnb_4bit_quant_type", "ignored"]),
        (["--optim", "paged_adamw_8bit", "--use_cpu"], ["--optim paged_adamw_8bit", "GPU"]),
        (["--lora_target_modules", "no_such_layer"], ["no_such_layer", "q_proj"]),
        (["--trust_remote_code"], ["--model_revision"]),
        (["--reference_model", "runs/sft", "--lora_r", "8"], ["--lora_r 8", "--reference_model"]),
        (["--report_to", "mlflow"], ["mlflow", "wandb"]),
        (["--dataset_format", "hh_rlhf"], ["hh_rlhf", "hh-rlhf"]),
        (["--save_total_limit", "1"], ["--save_total_limit 1", "at least 2"]),
        (["--save_minutes", "-1"], ["--save_minutes -1", "at least 0"]),
        (["--allow_changed", "beta"], ["--allow_changed beta", "no run has begun"]),
        (["--allow_changed", "bata"], ["--allow_changed bata", "the nearest is beta"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_option(
    arguments: list[str],
    parts: list[str],
    model_folder: Path,
    pairs_file: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = train("--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", out, *arguments)
    check(code, USAGE, capsys.readouterr().err, *parts)


def test_unknown_yaml_key_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text("learning_rat: 0.1\n")
    check(
        main(["train", "--config", str(tmp_path / "recipe.yaml")]),
        USAGE,
        capsys.readouterr().err,
        "learning_rat",
        "learning_rate",
    )


def test_yaml_reads_the_environment_and_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_dpo.cli import COMMANDS
    from qlora_dpo.command_line import parse

    (tmp_path / "recipe.yaml").write_text("beta: ${oc.env:MY_BETA,0.3}\nlora_r: 8\nloss_type: [sigmoid, sft]\n")
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--lora_r", "4"]
    assert parse("x", COMMANDS["train"], arguments)["beta"] == 0.3
    monkeypatch.setenv("MY_BETA", "0.7")
    options = parse("x", COMMANDS["train"], arguments)
    assert (options["beta"], options["lora_r"], options["loss_type"]) == (0.7, 4, ("sigmoid", "sft"))


def test_a_model_without_a_dataset(capsys: pytest.CaptureFixture[str]) -> None:
    check(main(["train", "--model_name_or_path", "x"]), USAGE, capsys.readouterr().err, "--dataset")


GOOD = b'{"prompt": "w4", "chosen": "w5", "rejected": "w6"}\n'
BAD_FILES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["pairs.jsonl", "empty"]),
    "without a key": (GOOD + b'{"prompt": "w4", "chosen": "w5"}\n', [":2", "rejected"]),
    "wrong type": (GOOD + b'{"prompt": "w4", "chosen": "w5", "rejected": 7}\n', [":2", "rejected"]),
    "equal answers": (GOOD + b'{"prompt": "w4", "chosen": "w5", "rejected": "w5"}\n', [":2", "same"]),
    "empty answer": (GOOD + b'{"prompt": "w4", "chosen": "", "rejected": "w5"}\n', [":2", "chosen"]),
    "broken JSON": (GOOD + b'{"prompt": "w4", \n', [":2", "json"]),
    "not UTF-8": (b'{"prompt": "w4", "chosen": "w5", "rejected": "\xff\xfe"}\n', ["pairs.jsonl:1", "UTF-8"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_file(
    name: str, model_folder: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, parts = BAD_FILES[name]
    (tmp_path / "pairs.jsonl").write_bytes(content)
    code = train("--model_name_or_path", model_folder, "--dataset", tmp_path / "pairs.jsonl", "--output_dir", out)
    check(code, DATA, capsys.readouterr().err, *parts)
    assert not any(out.glob("checkpoint-*")) and not (out / "adapter_model.safetensors").exists()


def test_missing_file(model_folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train("--model_name_or_path", model_folder, "--dataset", "/no/such/pairs.jsonl", "--output_dir", out)
    check(code, FILES, capsys.readouterr().err, "/no/such/pairs.jsonl")


def test_missing_model_folder(pairs_file: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train("--model_name_or_path", "/no/such/model", "--dataset", pairs_file, "--output_dir", out)
    check(code, FILES, capsys.readouterr().err, "/no/such/model")


def test_model_folder_without_weights(
    model_folder: Path, pairs_file: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    code = train("--model_name_or_path", copy, "--dataset", pairs_file, "--output_dir", out)
    check(code, FILES, capsys.readouterr().err, "safetensors", "pytorch_model.bin")


def test_truncated_weights(
    model_folder: Path, pairs_file: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model_folder, copy)
    os.truncate(copy / "model.safetensors", 1000)
    code = train("--model_name_or_path", copy, "--dataset", pairs_file, "--output_dir", out)
    check(code, DATA, capsys.readouterr().err, str(copy))


def test_model_that_a_cpu_cannot_quantize(
    pairs_file: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(intermediate_size=96).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code = train("--model_name_or_path", tmp_path / "model", "--dataset", pairs_file, "--output_dir", out, "--use_cpu")
    check(code, USAGE, capsys.readouterr().err, "model.layers.0.mlp.down_proj", "96", "--load_in_4bit false")


def test_output_folder_without_permission(
    model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train("--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", "/proc/run")
    check(code, FILES, capsys.readouterr().err, "--output_dir /proc/run")


def test_output_folder_with_something_else(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    code = train("--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", tmp_path, "--fresh")
    check(code, USAGE, capsys.readouterr().err, str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_gpu_without_memory(
    model_folder: Path,
    pairs_file: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    code = train("--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", out)
    check(code, MACHINE, capsys.readouterr().err, "out of memory", "--max_tokens_per_microbatch")


def test_reference_that_is_a_whole_model(
    model_folder: Path, pairs_file: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model_folder, tmp_path / "other")
    code = train(
        "--model_name_or_path",
        model_folder,
        "--dataset",
        pairs_file,
        "--output_dir",
        out,
        "--reference_model",
        tmp_path / "other",
    )
    check(code, DATA, capsys.readouterr().err, "never a second model")


def test_adapter_that_would_import_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"peft_type": "LORA", "auto_mapping": {"base_model_class": "os.system"}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    code = main(["merge", "--adapter", str(tmp_path), "--output", str(tmp_path / "out")])
    check(code, DATA, capsys.readouterr().err, "auto_mapping")
