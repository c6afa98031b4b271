"""Every recipe in rlhf/ is read by the real parser, says what its source says, fits its card, and runs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_config, tiny_tokenizer

from qlora_dpo.cli import COMMANDS, main
from qlora_dpo.command_line import parse
from qlora_dpo.config.checks import train_config
from qlora_dpo.training.records.tracking import read_metrics

RECIPES = Path(__file__).resolve().parents[1] / "rlhf"
QWEN_1_5B, QWEN_7B = "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct"
# What each one must say, from the runs that it repeats.
EXPECTED: dict[str, dict[str, Any]] = {
    "anima_33b_belle": {
        "model_name_or_path": "lyogavin/Anima33B-merged", "dataset": "lyogavin/Anima33B_rlhf_belle_eval_1k",
        "lora_r": 256, "lora_alpha": 16, "beta": 0.1, "max_steps": 100, "max_grad_norm": 0.3, "eval_steps": 10,
        "save_steps": 10, "optim": "paged_adamw_32bit", "learning_rate": 1e-4, "warmup_ratio": 0.03, "lora_dropout": 0,
        "dtype": "bfloat16", "max_new_tokens": 370, "bnb_4bit_quant_type": "nf4", "max_length": 600,
    },
    "llama3_70b_48gb": {
        "model_name_or_path": "meta-llama/Meta-Llama-3-70B-Instruct", "beta": 0.1, "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.2], "lora_r": 16, "optim": "paged_adamw_8bit",
    },
    "opendpo": {
        "model_name_or_path": QWEN_7B, "beta": 0.5, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5],
        "max_tokens_per_microbatch": 8192,
    },
    "qwen2.5_1.5b_human_like": {
        "objective": "dpo", "model_name_or_path": QWEN_1_5B, "dataset_format": "plaintext",
        "dataset": "HumanLLMs/Human-Like-DPO-Dataset", "beta": 0.1, "num_train_epochs": 2, "save_steps": 30,
    },
    "qwen2.5_7b_hh_24gb": {
        "model_name_or_path": QWEN_7B, "dataset": "Anthropic/hh-rlhf", "dataset_format": "hh-rlhf", "beta": 0.1,
        "num_train_epochs": 1, "learning_rate": 5e-6,
    },
    "sft_mixture_of_thoughts": {
        "objective": "sft", "model_name_or_path": QWEN_1_5B, "dataset_format": "messages", "messages_key": "messages",
        "num_train_epochs": 5, "save_steps": 50, "dataset_split": "train",
    },
}  # fmt: skip
BATCH = {name: 16 if name == "anima_33b_belle" else 64 for name in EXPECTED}
# Of the recipes' models, as their authors publish them; what is not named is as in `tiny_config`.
LLAMA_33B = {
    "hidden_size": 6656, "num_hidden_layers": 60, "num_attention_heads": 52, "num_key_value_heads": 52, "head_dim": 128,
    "intermediate_size": 17920, "vocab_size": 32000,
}  # fmt: skip
LLAMA_70B = {
    "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 28672, "vocab_size": 128256,
}  # fmt: skip
QWEN2_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "head_dim": None, "intermediate_size": 8960, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN2_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "head_dim": None, "intermediate_size": 18944, "vocab_size": 152064,
}  # fmt: skip
# With which rlhf/README.md puts 33B on a small card.
FRUGAL = ("--lora_r", "16", "--lora_alpha", "1", "--optim", "paged_adamw_8bit")
NO_SPLIT = ("--eval_split", "null")  # for data without the recipe's split of that name
PAIRS = 24  # with which a plan is made: more than any micro-batch holds


@dataclass(frozen=True)
class Fit:
    """A recipe on a card, and what is known of its model without this tool.

    `weights` and `others` are GB of the quantized and of the other weights, `trained` are millions of parameters;
    `lengths` are usual ones of prompt, chosen and rejected, beside which one pair is as long as it may be. The `quick`
    ones are planned in every run of the tests.
    """

    recipe: str
    shape: dict[str, Any]
    card: float
    weights: float
    others: float
    trained: float
    lengths: tuple[int, int, int]
    options: tuple[str, ...] = ()
    quick: bool = False


FITS = [
    Fit("anima_33b_belle", LLAMA_33B, 80, 16.56, 0.85, 1950.4, (122, 263, 71), quick=True),
    Fit("anima_33b_belle", LLAMA_33B, 24, 16.56, 0.85, 121.9, (122, 263, 71), FRUGAL),
    Fit("qwen2.5_7b_hh_24gb", QWEN2_7B, 24, 3.37, 2.18, 40.37, (128, 41, 53), quick=True),
    Fit("llama3_70b_48gb", LLAMA_70B, 48, 35.31, 4.20, 207.09, (200, 300, 250), quick=True),
    Fit("llama3_70b_48gb", LLAMA_70B, 44.9, 35.31, 4.20, 207.09, (200, 300, 250), NO_SPLIT),  # with error correction
    Fit("qwen2.5_1.5b_human_like", QWEN2_1_5B, 8, 0.68, 0.47, 73.86, (20, 130, 100)),
    Fit("sft_mixture_of_thoughts", QWEN2_1_5B, 8, 0.68, 0.47, 73.86, (150, 5000, 0)),
    Fit("opendpo", QWEN2_7B, 24, 3.37, 2.18, 161.48, (1000, 500, 500)),
]  # fmt: skip


def words(number: int, count: int) -> str:
    return " ".join(f"w{40 + (number + place) % 60}" for place in range(count))


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


def row(recipe: str, number: int, lengths: tuple[int, int, int] = (2, 3, 2)) -> dict[str, Any]:
    """A row in the form of the recipe's data set; `lengths` are words of prompt, better and worse answer."""
    question, better, worse = (words(number + place, count) for place, count in enumerate(lengths))
    match recipe:
        case "anima_33b_belle":
            start = f"\n\nHuman: {question}\n\nAssistant: "
            return {"chosen": start + better, "rejected": start + worse}
        case "qwen2.5_7b_hh_24gb":
            start = f"\n\nHuman: {words(number, 2)}\n\nAssistant: w9\n\nHuman: {question}\n\nAssistant: "
            return {"chosen": start + better, "rejected": start + worse}
        case "llama3_70b_48gb":
            both = {"chosen": messages(question, better), "rejected": messages(question, worse)}
            return both | {"score_chosen": 8.5, "score_rejected": 4.0}
        case "qwen2.5_1.5b_human_like":
            return {"prompt": question, "chosen": better, "rejected": worse}
        case "sft_mixture_of_thoughts":
            return {"messages": messages(question, better), "num_tokens": 5, "source": "made"}
        case _:
            return {
                "context": messages(question), "chosen": messages("", better)[1], "rejected": messages("", worse)[1],
                "reference_chosen_log_prob": -3.5, "reference_rejected_log_prob": -2.5,
                "meta": {"category_id": str(number % 2), "category_name": "ab"[number % 2]},
            }  # fmt: skip


def settings(recipe: str) -> dict[str, Any]:
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())


def write_data(folder: Path, recipe: str, rows: list[dict[str, Any]]) -> Path:
    """A file of rows, or a folder with a file for each split where the recipe names a second one."""
    lines = [json.dumps(row) + "\n" for row in rows]
    if "eval_split" not in settings(recipe):
        (folder / "data.jsonl").write_text("".join(lines))
        return folder / "data.jsonl"
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(lines[4:]))
    (folder / "data" / "test.jsonl").write_text("".join(lines[:4]))
    return folder / "data"


def test_every_recipe_is_known_to_these_tests_and_to_the_page() -> None:
    files = {path.stem for path in RECIPES.glob("*.yaml")}
    assert files == set(EXPECTED) == {fit.recipe for fit in FITS}
    assert files == set(re.findall(r"^\| `([\w.]+)\.yaml`", (RECIPES / "README.md").read_text(), re.MULTILINE))


@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipe_says_what_its_source_says(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL_PATH", "DATASET_PATH", "CHECKPOINT_ROOT_DIR"):
        monkeypatch.delenv(name, raising=False)
    options = parse("qlora_dpo train", COMMANDS["train"], ["--config", str(RECIPES / f"{recipe}.yaml")])
    config = train_config(options)  # nothing impossible, nothing that would be ignored
    flat = config.flat()
    assert {name: flat[name] for name in EXPECTED[recipe]} == EXPECTED[recipe]
    assert str(flat["output_dir"]) == f"runs/{recipe}"
    assert config.pairs_per_step == BATCH[recipe]


@pytest.mark.parametrize("recipe", EXPECTED)
def test_numbers_have_their_reasons_beside_them(recipe: str) -> None:
    """On the line, or on the one before it, which is then about both."""
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert text.startswith("# ") and f"--config rlhf/{recipe}.yaml" in text
    lines = text.splitlines()
    for before, line in pairwise(lines):
        if re.match(r"\w+: \[?[\d.]", line):
            assert "#" in line or "#" in before, line


def test_commands_of_the_page_are_accepted() -> None:
    page = (RECIPES / "README.md").read_text()
    found = re.findall(r"(?:run_dpo_training.sh|python -m qlora_dpo plan) --config (rlhf/\S+)(.*)", page)
    assert len(found) >= 7
    assert " ".join(FRUGAL) in page
    for file, options in found:
        command = "plan" if "--gpu_memory" in options else "train"
        train_config(parse("qlora_dpo", COMMANDS[command], ["--config", str(RECIPES.parent / file), *options.split()]))


@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipe_with_a_key_that_is_unknown_is_refused(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text((RECIPES / f"{recipe}.yaml").read_text() + "lora_rank: 8\n")
    assert main(["train", "--config", str(file)]) == 2
    assert "lora_rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fit",
    [
        pytest.param(fit, id=f"{fit.recipe}-on-{fit.card:g}", marks=[] if fit.quick else [pytest.mark.slow])
        for fit in FITS
    ],
)
def test_plan_says_that_the_recipe_fits_its_card(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = settings(fit.recipe)
    most = recipe["max_length"]
    rows = [row(fit.recipe, number, fit.lengths) for number in range(PAIRS)]
    rows += [row(fit.recipe, PAIRS, (2, most + 10, most + 10))]
    tiny_config(**fit.shape).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("qlora_dpo.training.policy.load_tokenizer", lambda *_: tiny_tokenizer())  # one token per word
    monkeypatch.setenv("MODEL_PATH", str(tmp_path / "model"))
    monkeypatch.setenv("DATASET_PATH", str(write_data(tmp_path, fit.recipe, rows)))
    command = ["plan", "--config", str(RECIPES / f"{fit.recipe}.yaml"), "--gpu_memory", str(fit.card), *fit.options]
    assert main([*command, "--eval_fraction", "0"] if "eval_split" not in recipe else command) == 0
    text = capsys.readouterr().out

    def number(pattern: str) -> float:
        found = re.search(pattern, text, re.MULTILINE)
        assert found, f"{pattern} is not in\n{text}"
        return float(found[1].replace(",", ""))

    gib = 2**30 / 1e9
    assert number(r"^  together +([\d.]+) of") <= fit.card
    assert number(r"^  quantized weights +([\d.]+)") * gib == pytest.approx(fit.weights, abs=0.01)
    assert number(r"^  other weights +([\d.]+)") * gib == pytest.approx(fit.others, abs=0.01)
    assert number(r"^([\d.]+) M parameters are trained") == pytest.approx(fit.trained, abs=0.1)
    assert number(r"steps of (\d+) (?:pairs|conversations)") == BATCH[fit.recipe]
    assert recipe.get("max_steps") in (None, number(r"^([\d,]+) steps of"))
    longest = most if recipe.get("objective") == "sft" else 2 * most
    assert number(r"^Tokens at once .*: (\d+)") >= 0.9 * longest  # less the prompt, which two answers share
    assert "do not fit" not in text and "at 40% of its peak" in text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EXPECTED)
def test_recipe_runs_two_steps_on_a_tiny_model(
    recipe: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MODEL_PATH", str(model_folder))
    monkeypatch.setenv("DATASET_PATH", str(write_data(tmp_path, recipe, [row(recipe, number) for number in range(40)])))
    monkeypatch.setenv("CHECKPOINT_ROOT_DIR", str(tmp_path / "checkpoints"))
    # A CPU has no paged optimizer, the tiny model no 256 ranks.
    said = settings(recipe)
    small = ["--optim", "adamw_torch", "--lora_r", "4", "--gradient_accumulation_steps", "64", "--report_to", "none"]
    arguments = ["train", "--config", str(RECIPES / f"{recipe}.yaml"), "--max_steps", "2", *small]
    arguments += ["--eval_fraction", "0.1"] if "eval_split" not in said else []
    arguments += ["--max_new_tokens", "4"] if "sample_generate" in said else []
    assert main(arguments) == 0, capsys.readouterr().err
    rows = read_metrics(tmp_path / "checkpoints" / recipe / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["learning_rate"] > 0 and rows[-1]["grad_norm"] > 0 and "eval_loss" in rows[-1]
