"""Every recipe in rlhf/ is read by the real parser, says what its source says, and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_dpo.cli import COMMANDS, main
from qlora_dpo.command_line import parse
from qlora_dpo.config.checks import train_config
from qlora_dpo.training.records.tracking import read_metrics

RECIPES = Path(__file__).resolve().parents[1] / "rlhf"
# What each one must say, from the runs that it repeats.
EXPECTED: dict[str, dict[str, Any]] = {
    "human_like_dpo": {
        "objective": "dpo", "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "dataset_format": "plaintext",
        "dataset": "HumanLLMs/Human-Like-DPO-Dataset", "beta": 0.1, "num_train_epochs": 2, "save_steps": 30,
    },
    "mixture_of_thoughts_sft": {
        "objective": "sft", "dataset_format": "messages", "messages_key": "messages", "num_train_epochs": 5,
        "save_steps": 50, "dataset_split": "train",
    },
    "opendpo": {
        "beta": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "max_tokens_per_microbatch": 8192,
    },
    "anima_33b": {
        "model_name_or_path": "lyogavin/Anima33B-merged", "dataset": "lyogavin/Anima33B_rlhf_belle_eval_1k",
        "lora_r": 256, "lora_alpha": 16, "beta": 0.1, "max_steps": 100, "max_grad_norm": 0.3, "eval_steps": 10,
        "save_steps": 10, "optim": "paged_adamw_32bit", "learning_rate": 1e-4, "warmup_ratio": 0.03, "lora_dropout": 0,
        "dtype": "bfloat16", "max_new_tokens": 370, "bnb_4bit_quant_type": "nf4",
    },
}  # fmt: skip
BATCH = {"human_like_dpo": 64, "mixture_of_thoughts_sft": 64, "anima_33b": 16}


def word(number: int) -> str:
    return f"w{40 + number % 60}"


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def row(recipe: str, number: int) -> dict[str, Any]:
    """A row in the form of the recipe's data set."""
    question, better, worse = f"{word(number)} w7", f"{word(number + 1)} w4 w5", f"{word(number + 2)} w6"
    return {
        "human_like_dpo": {"prompt": question, "chosen": better, "rejected": worse},
        "mixture_of_thoughts_sft": {"messages": messages(question, better), "num_tokens": 5, "source": "made"},
        "opendpo": {
            "context": messages(question), "chosen": messages("", better)[1], "rejected": messages("", worse)[1],
            "reference_chosen_log_prob": -3.5, "reference_rejected_log_prob": -2.5,
            "meta": {"category_id": str(number % 2), "category_name": "ab"[number % 2]},
        },
        "anima_33b": {
            "chosen": f"\n\nHuman: {question}\n\nAssistant: {better}",
            "rejected": f"\n\nHuman: {question}\n\nAssistant: {worse}",
        },
    }[recipe]  # fmt: skip


def test_every_recipe_is_known_to_these_tests_and_to_the_page() -> None:
    files = {path.stem for path in RECIPES.glob("*.yaml")}
    assert files == set(EXPECTED)
    assert files == set(re.findall(r"^\| `(\w+)\.yaml`", (RECIPES / "README.md").read_text(), re.MULTILINE))


@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipe_says_what_its_source_says(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL_PATH", "DATASET_PATH", "CHECKPOINT_ROOT_DIR"):
        monkeypatch.delenv(name, raising=False)
    options = parse("qlora_dpo train", COMMANDS["train"], ["--config", str(RECIPES / f"{recipe}.yaml")])
    config = train_config(options)  # nothing impossible, nothing that would be ignored
    flat = config.flat()
    assert {name: flat[name] for name in EXPECTED[recipe]} == EXPECTED[recipe]
    assert str(flat["output_dir"]) == f"runs/{recipe}"
    if recipe in BATCH:
        assert config.pairs_per_step == BATCH[recipe]


@pytest.mark.parametrize("recipe", EXPECTED)
def test_numbers_have_their_reasons_beside_them(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert text.startswith("# ") and f"--config rlhf/{recipe}.yaml" in text
    assert sum("#" in line for line in text.splitlines()) >= 10
    assert "objective" in yaml.safe_load(text) or recipe != "mixture_of_thoughts_sft"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipe_runs_two_steps_on_a_tiny_model(
    recipe: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row(recipe, number)) + "\n" for number in range(40)))
    monkeypatch.setenv("MODEL_PATH", str(model_folder))
    monkeypatch.setenv("DATASET_PATH", str(file))
    monkeypatch.setenv("CHECKPOINT_ROOT_DIR", str(tmp_path / "checkpoints"))
    # One step holds all rows, so two epochs are two steps; a CPU has no paged optimizer, the tiny model no 256 ranks.
    steps = ["--max_steps", "2"] if recipe == "anima_33b" else ["--num_train_epochs", "2"]
    small = ["--optim", "adamw_torch", "--lora_r", "4", "--gradient_accumulation_steps", "64", "--report_to", "none"]
    arguments = ["train", "--config", str(RECIPES / f"{recipe}.yaml"), *steps, *small, "--eval_fraction", "0.1"]
    arguments += ["--max_new_tokens", "4"] if recipe == "anima_33b" else []
    assert main(arguments) == 0, capsys.readouterr().err
    rows = read_metrics(tmp_path / "checkpoints" / recipe / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["learning_rate"] > 0 and rows[-1]["grad_norm"] > 0 and "eval_loss" in rows[-1]
