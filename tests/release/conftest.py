"""Fixtures of what is released: a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_models import write_sentencepiece

from qlora_dpo.cli import main


@pytest.fixture(scope="session")
def short_run(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on a plain base, whose adapter changes the answers; it held out twelve pairs."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = [
        "--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", out, "--dtype", "float32",
        "--max_steps", "4", "--learning_rate", "0.02", "--gradient_accumulation_steps", "4", "--lora_r", "4",
        "--load_in_4bit", "false", "--eval_fraction", "0.3",
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    return out


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer.model of LLaMA's kind."""
    return write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
