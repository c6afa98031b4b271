"""SFT, then DPO from there, on the embedded base: with the same pair steps it gets further than DPO alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main
from qlora_dpo.config.training import TrainingOptions
from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.demo.base_model import BASE
from qlora_dpo.demo.run import answer
from qlora_dpo.demo.world import Question, held_out_questions, is_explained, states_fact, training_questions
from qlora_dpo.training.records.tracking import read_metrics
from qlora_dpo.training.trained_on import load_trained

COMMON = [
    "--model_name_or_path", str(BASE), "--gradient_accumulation_steps", "8", "--max_steps", "8",
    "--learning_rate", "1e-3", "--max_length", "192", "--eval_steps", "100", "--activation_checkpointing", "none",
]  # fmt: skip
LORA, PAIRS = ["--lora_r", "16", "--lora_alpha", "32"], ["--max_prompt_length", "96"]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def train(out: Path, data: Path, held_out: Path, *more: str | Path) -> dict[str, Any]:
    """Train by command; returns the metrics of the last step."""
    arguments = ["--dataset", data, "--eval_dataset", held_out, "--output_dir", out, *COMMON, *more]
    assert main(["train", *map(str, arguments)]) == 0
    return read_metrics(out / "metrics.jsonl")[-1]


def measured(adapter: Path, questions: list[Question]) -> tuple[float, float]:
    """Shares of held-out questions that are answered with an explanation, and with the right fact."""
    model, tokenizer = load_trained(adapter, use_cpu=True)
    prompts = PairTokenizer(tokenizer, 192, 96)
    options = TrainingOptions(max_new_tokens=64)
    answers = answer(model, tokenizer, prompts, questions, options, use_reference=False)
    pairs = list(zip(answers, questions, strict=True))
    explained, right = (sum(judge(*pair) for pair in pairs) / len(pairs) for judge in (is_explained, states_fact))
    return explained, right


@pytest.mark.slow
def test_sft_then_dpo_beats_dpo_alone_with_the_same_pair_steps(tmp_path: Path) -> None:
    asked = held_out_questions()
    files = {}
    for name, questions in (("train", training_questions()), ("held_out", asked)):
        # The base answers tersely: what it says by itself is `rejected`, as in the demo.
        pairs = [{"prompt": q.prompt, "chosen": q.explained, "rejected": q.terse} for q in questions]
        chats = [{"prompt": q.prompt, "response": q.explained} for q in questions]
        files[name] = write(tmp_path / f"{name}_pairs.jsonl", pairs), write(tmp_path / f"{name}_chats.jsonl", chats)
    (pairs_file, chats_file), (held_out_pairs, held_out_chats) = files["train"], files["held_out"]

    train(tmp_path / "alone", pairs_file, held_out_pairs, *LORA, *PAIRS)
    train(tmp_path / "sft", chats_file, held_out_chats, *LORA, "--objective", "sft")
    chain = train(tmp_path / "chain", pairs_file, held_out_pairs, *PAIRS, "--reference_model", tmp_path / "sft")

    explained_alone, _ = measured(tmp_path / "alone", asked)
    explained_chain, right_chain = measured(tmp_path / "chain", asked)
    assert explained_chain >= 0.6 and explained_chain >= explained_alone + 0.3
    assert right_chain >= 0.95
    assert chain["eval_rewards/accuracies"] >= 0.95
