"""Rows and answers that go past the positions of a base: a sentence where a table ends, a warning where it turns on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.config.training import DataOptions
from qlora_dpo.errors import UsageError
from qlora_dpo.models.generation import generate
from qlora_dpo.models.loading import model_on_meta
from qlora_dpo.models.positions import known_positions, table_of_positions
from qlora_dpo.training.data import load_training_data
from qlora_dpo.training.row_positions import check_positions

# Families with a table of 8 positions, learned or computed.
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 8, "n_embd": 64, "n_head": 4, "n_layer": 1},
    "opt": {"max_position_embeddings": 8, "ffn_dim": 128, "word_embed_proj_dim": 64, "num_hidden_layers": 1},
    "gpt_neo": {"max_position_embeddings": 8, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
    "gptj": {"n_positions": 8, "n_embd": 64, "n_head": 4, "n_layer": 1, "rotary_dim": 16},
}


def config_of(family: str, shape: dict[str, Any]) -> Any:
    own = {"max_position_embeddings": None} if "n_positions" in shape else {}
    return tiny_config(family, **(own | shape))


def model_of(family: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, TABLES[family])).eval()


@pytest.fixture(scope="module")
def data(pairs_file: Path) -> Any:
    return load_training_data(DataOptions(dataset=str(pairs_file)), tiny_tokenizer(), 0)


@pytest.mark.parametrize("family", TABLES)
def test_rows_past_a_table_are_refused_with_the_longest(family: str, data: Any, pairs_file: Path) -> None:
    longest = max(len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in data.pairs)
    expected = (
        rf"longer than the 8 positions of this base; the longest, {pairs_file}:\d+, has {longest} tokens.*--max_l"
    )
    with pytest.raises(UsageError, match=expected):
        check_positions(config_of(family, TABLES[family]), data)


@pytest.mark.parametrize(
    ("family", "shape", "known"),
    [
        ("llama", {"max_position_embeddings": 8}, 8),
        ("llama", {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "linear", "factor": 40.0}}, 320),
        ("gemma3_text", {"max_position_embeddings": 8}, 8),
        ("gpt_neox", {"max_position_embeddings": 8}, 8),
        ("bloom", {"max_position_embeddings": None, "n_head": 4, "n_layer": 1}, None),
    ],
)
def test_rotations_go_on_with_a_warning_unless_they_are_stretched(
    family: str, shape: dict[str, Any], known: int | None, data: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if "rope_parameters" in shape:
        shape = shape | {"rope_parameters": shape["rope_parameters"] | {"rope_theta": 1e4}}
    config = tiny_config(family, **shape)
    assert known_positions(config) == known and table_of_positions(model_on_meta(config)) is None
    check_positions(config, data)
    assert ("warning:" in capsys.readouterr().err) == (known == 8)


def test_nothing_is_said_of_rows_that_fit(data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check_positions(tiny_config(), data)
    check_positions(config_of("gpt2", TABLES["gpt2"] | {"n_positions": 512}), data)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("family", TABLES)
def test_answers_end_where_the_table_does(family: str) -> None:
    model, tokenizer = model_of(family), tiny_tokenizer()
    (answer,) = generate(model, tokenizer, [[1, 5, 6, 7, 8]], max_new_tokens=20, end_token_ids=[2])
    assert len(answer.split()) <= 3
    with pytest.raises(UsageError, match="a prompt of 8 tokens leaves no room for an answer: this model has 8"):
        generate(model, tokenizer, [[1] * 8], max_new_tokens=20, end_token_ids=[2])


def test_answers_past_rotations_are_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(max_position_embeddings=8).eval()
    for _ in range(2):
        generate(model, tiny_tokenizer(), [[1, 5, 6]], max_new_tokens=20, end_token_ids=[2])
    assert capsys.readouterr().err.count("go past the 8 positions that this model knows") == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "train"])
def test_commands_refuse_before_the_weights_are_read(
    command: str, tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    config_of("gpt2", TABLES["gpt2"]).save_pretrained(base)  # without weights
    tiny_tokenizer().save_pretrained(base)
    (base / "model.safetensors").write_bytes(b"")
    options = ["--model_name_or_path", str(base), "--dataset", str(pairs_file), "--use_cpu", "true"]
    options += ["--output_dir", str(tmp_path / "run")] if command == "train" else []
    assert main([command, *options]) == 2
    assert "longer than the 8 positions of this base" in capsys.readouterr().err
