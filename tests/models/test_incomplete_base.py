"""A base whose files lack weights, or hold others than its config says, is refused: parts of it would be random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.config.training import ModelOptions, quantization_of
from qlora_dpo.errors import ModelError
from qlora_dpo.models.loading import load_base

CPU = torch.device("cpu")
HELD: dict[str, Any] = {"bfloat16": None, "4bit": quantization_of(ModelOptions()), "8bit": {"load_in_8bit": True}}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
Tensors = dict[str, torch.Tensor]


def saved(folder: Path, change: Callable[[Tensors], Any], model_type: str = "llama", **shape: Any) -> Path:
    """A model whose file was changed after it was saved."""
    tiny_model(model_type, **shape).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rename(old: str, new: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def halve(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[name][: len(tensors[name]) // 2].contiguous()})


def rename_all(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[f"net.{name}"] = tensors.pop(name)


def add(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.ones(4)})


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(
    ("model_type", "shape", "change", "expected"),
    [
        ("llama", {}, drop("model.norm.weight"), "missing: model.norm.weight."),
        ("llama", {}, drop(EMBEDDING), f"missing: {EMBEDDING}."),
        ("llama", {"tie_word_embeddings": True}, drop(EMBEDDING), f"missing: lm_head.weight, {EMBEDDING}."),
        ("llama", {}, drop("lm_head.weight"), "missing: lm_head.weight."),
        ("llama", {}, drop(UP), f"missing: {UP}."),
        ("gpt2", GPT2, drop("transformer.h.0.attn.c_attn.weight"), "missing: transformer.h.0.attn.c_attn.weight."),
        ("llama", {}, rename(UP, "w3"), f"missing: {UP}; unknown to LlamaForCausalLM: w3."),
        (
            "llama",
            {},
            rename_all,
            "input_layernorm.weight and 18 more; unknown to LlamaForCausalLM: net.lm",
        ),
        ("llama", {}, halve(UP), f"of another shape: {UP} ((64, 64) instead of (128, 64))."),
        ("llama", {}, halve("model.norm.weight"), "of another shape: model.norm.weight ((32,) instead of (64,))."),
        ("llama", {}, add("model.layers.2.mlp.up_proj.weight"), "LlamaForCausalLM: model.layers.2.mlp.up_proj.weight."),
        ("llama", {}, add("model.norm.bias"), "unknown to LlamaForCausalLM: model.norm.bias."),
        ("mixtral", EXPERTS, drop(EXPERT), "incomplete: model.layers.0.mlp.experts.gate_up_proj."),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(
    model_type: str,
    shape: dict[str, Any],
    change: Callable[[Tensors], Any],
    expected: str,
    held: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = saved(tmp_path, change, model_type, **shape)
    with pytest.raises(ModelError) as refused:
        load_base(str(folder), device=CPU, quantization=HELD[held])
    assert expected in str(refused.value) and "\n" not in str(refused.value)
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize(
    ("change", "model_type", "shape"),
    [
        (lambda tensors: None, "llama", {"tie_word_embeddings": True}),
        (lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}), "llama", {}),
        (lambda tensors: None, "mixtral", EXPERTS),
        (lambda tensors: None, "gpt2", GPT2),
    ],
    ids=["tied", "buffers of old", "experts", "columns"],
)
def test_what_is_absent_or_left_over_with_good_reason_loads(
    change: Any, model_type: str, shape: dict[str, Any], held: str, tmp_path: Path
) -> None:
    load_base(str(saved(tmp_path, change, model_type, **shape)), device=CPU, quantization=HELD[held])


def test_what_a_class_leaves_out_on_purpose_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The masks of GPT-2's first files; a bias of the same ending is loaded."""
    masks = {"transformer.h.0.attn.bias": torch.ones(1), "transformer.h.1.attn.bias": torch.ones(1)}
    load_base(str(saved(tmp_path, lambda tensors: tensors.update(masks), "gpt2", **GPT2)), device=CPU)
    said = capsys.readouterr().err
    assert f"{tmp_path}: GPT2LMHeadModel leaves out transformer.h.0.attn.bias, transformer.h.1.attn.bias." in said


def test_a_config_of_another_size_than_its_weights_is_refused(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_config(intermediate_size=192, num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"missing: .*model\.layers\.2\..*of another shape: .*mlp"):
        load_base(str(tmp_path), device=CPU, quantization=HELD["4bit"])


@pytest.mark.slow
def test_train_ends_with_65_and_one_sentence(
    tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "base", drop("model.norm.weight"))
    tiny_tokenizer().save_pretrained(folder)
    run = str(tmp_path / "run")
    assert main(["train", "--model_name_or_path", str(folder), "--dataset", str(pairs_file), "--output_dir", run]) == 65
    said = capsys.readouterr().err
    assert "missing: model.norm.weight" in said and "Traceback" not in said
