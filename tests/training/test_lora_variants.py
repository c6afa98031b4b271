"""rsLoRA, DoRA and LoRA+ start as the base, train, continue exactly, and merge as PEFT merges them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from release.tiny_adapters import logits
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model

from qlora_dpo.cli import main
from qlora_dpo.errors import UsageError
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lora import add_adapter, trainable_parameters
from qlora_dpo.models.skeleton import build_skeleton
from qlora_dpo.training.optimizers import make_loraplus_optimizer
from qlora_dpo.training.records.tracking import read_metrics

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
CPU = torch.device("cpu")
WHOLE = ("--modules_to_save", "embed_tokens", "lm_head")


@pytest.fixture
def train(model_folder: Path, pairs_file: Path) -> Callable[..., int]:
    def run(out: Path, *more: str | Path) -> int:
        options = ["--max_steps", "4", "--gradient_accumulation_steps", "2", "--learning_rate", "0.02", "--lora_r", "4"]
        arguments = ["--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", out, *options]
        return main(["train", *map(str, [*arguments, *more])])

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", [("--use_rslora",), ("--use_dora",), WHOLE], ids=str)
def test_a_variant_starts_as_the_base_and_trains(
    train: Callable[..., int], tmp_path: Path, variant: tuple[str, ...], dtype: str
) -> None:
    assert train(tmp_path / "run", *variant, "--dtype", dtype) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[-1]["rewards/margins"] != 0
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())[variant[0].removeprefix("--")]


@pytest.mark.parametrize("options", [("--use_rslora",), ("--use_dora", "--loraplus_lr_ratio", "8"), WHOLE])
def test_a_merge_is_that_of_peft(
    train: Callable[..., int], model_folder: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run, out = tmp_path / "run", tmp_path / "merged"
    assert train(run, *options, "--dtype", "float32", "--load_in_4bit", "false") == 0
    merge = ["merge", "--adapter", run, "--output", out, "--measure", "false", "--base", "original"]
    assert main([*map(str, merge), "--dtype", "float32"]) == 0
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(run)).merge_and_unload())
    assert (logits(AutoModelForCausalLM.from_pretrained(out)) - expected).abs().max() < 1e-5
    assert (expected - before).abs().max() > 1e-2


def stopped_and_continued(train: Callable[..., int], out: Path, monkeypatch: Any, *options: str) -> None:
    """A run that is stopped in its third step, and then goes on."""
    from qlora_dpo.training import loop
    from qlora_dpo.training.signals import StopRequested

    whole = loop.gradient

    def stopping(training: Any, *values: Any) -> Any:
        if training.scheduler.last_epoch == 2:
            raise StopRequested("a signal came")
        return whole(training, *values)

    monkeypatch.setattr(loop, "gradient", stopping)
    assert train(out, *options) != 0
    monkeypatch.setattr(loop, "gradient", whole)
    assert train(out, *options) == 0


@pytest.mark.parametrize("options", [("--use_dora", "--loraplus_lr_ratio", "8"), WHOLE], ids=str)
def test_a_continued_run_is_the_unbroken_one(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    assert train(tmp_path / "whole", *options, "--dtype", "float32") == 0
    stopped_and_continued(train, tmp_path / "broken", monkeypatch, *options, "--dtype", "float32")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("magnitude" in name or "embed_tokens" in name for name in one)


def test_the_fused_forward_knows_the_scale_of_rslora_and_leaves_dora_to_peft() -> None:
    plain, scaled, dora = (
        add_adapter(tiny_model(), r=4, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0, **options)
        for options in ({}, {"use_rslora": True}, {"use_dora": True})
    )
    for model in (plain, scaled):
        for parameter in trainable_parameters(model):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    expected = logits(scaled)
    assert (expected - logits(plain)).abs().max() > 1e-3
    assert fuse_lora(scaled) == 2 and fuse_lora(dora) == 0
    torch.testing.assert_close(logits(scaled), expected)


def test_b_learns_faster_by_the_ratio_and_nothing_is_left_out() -> None:
    model = add_adapter(tiny_model(), r=4, alpha=4, dropout=0.0, target_modules=["q_proj"], seed=0, use_dora=True)
    optimizer = make_loraplus_optimizer(
        "auto", model, CPU, ratio=16, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6
    )
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert rates.keys() == {id(parameter) for parameter in trainable_parameters(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1e-3 if "lora_A" in name else 16e-3)
    with pytest.raises(UsageError, match="needs a GPU"):
        make_loraplus_optimizer("adamw_8bit", model, CPU, ratio=2, lr=1.0, weight_decay=0.0)


@pytest.mark.parametrize("quantization", [None, NF4], ids=["none", "nf4"])
def test_a_plan_counts_doras_lengths(quantization: dict[str, Any] | None) -> None:
    asked: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "up_proj"], "use_dora": True}
    real = trainable_parameters(add_adapter(tiny_model(), alpha=8, dropout=0.0, seed=0, **asked))
    skeleton = build_skeleton(tiny_config(), quantization=quantization, dtype=torch.float32, **asked)
    assert skeleton.adapter_parameters == sum(parameter.numel() for parameter in real)
    plain = build_skeleton(tiny_config(), quantization=None, dtype=torch.float32, **(asked | {"use_dora": False}))
    assert skeleton.adapter_parameters - plain.adapter_parameters == 2 * (64 + 128)


def test_a_plan_counts_whole_modules_in_fp32() -> None:
    asked: dict[str, Any] = {"r": 8, "target_modules": ["q_proj"], "quantization": NF4, "dtype": torch.bfloat16}
    plain, whole = (build_skeleton(tiny_config(), **asked, modules_to_save=names) for names in ((), WHOLE[1:]))
    assert whole.adapter_bytes - plain.adapter_bytes == 2 * 128 * 64 * 4


@pytest.mark.parametrize(("name", "message"), [("q_proj", "it is quantized"), ("embeds", "has no such module")])
def test_modules_that_cannot_be_trained_are_refused(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert train(tmp_path / "run", "--modules_to_save", name) == 2
    assert f"--modules_to_save {name}" in (said := capsys.readouterr().err) and message in said


def test_initializations_that_change_the_base_are_refused(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--init_lora_weights", "pissa") == 2
    assert "the adapter off is the reference" in capsys.readouterr().err
