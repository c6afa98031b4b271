"""Twenty steps on real pairs with LLaMA's own tokenizer: refused rows are named, the loss starts at ln 2."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from tiny import tiny_model

from qlora_dpo.cli import main


@pytest.fixture(scope="module")
def llama_folder(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model(vocab_size=32_000, max_position_embeddings=2048).save_pretrained(folder)
    shutil.copy(shared_data / "llama_tokenizer" / "tokenizer.model", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "template", "refused", "reason"),
    [("belle_pairs_hh", "anima", 9, "the same answer as chosen"), ("hh_rlhf_harmless_600", "hh-rlhf", 2, "empty")],
)
def test_twenty_steps(
    name: str, template: str, refused: int, reason: str, llama_folder: Path, shared_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    arguments = [
        "train", "--model_name_or_path", llama_folder, "--dataset", shared_data / f"{name}.jsonl", "--output_dir", out,
        "--prompt_template", template, "--max_steps", "20", "--gradient_accumulation_steps", "4",
        "--max_eval_samples", "4", "--lora_r", "8", "--learning_rate", "0.001",
        "--max_length", "512", "--max_prompt_length", "256",
    ]  # fmt: skip
    assert main([*map(str, arguments)]) == 65
    said = capsys.readouterr().err
    assert f"{refused} of" in said and reason in said and f"{name}.jsonl:" in said
    assert main([*map(str, arguments), "--bad_rows", "skip"]) == 0
    assert reason in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-6
    assert all(math.isfinite(row["loss"]) for row in rows)
