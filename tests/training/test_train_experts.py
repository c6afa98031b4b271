"""Runs and plans of mixtures of experts."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MIXTURES, random_pairs, tiny_config, tiny_model
from training.runs import adapter_weights, make_training, run

from qlora_dpo.cli import main
from qlora_dpo.errors import Interrupted
from qlora_dpo.models import experts
from qlora_dpo.models.lora import add_adapter
from qlora_dpo.training.loop import fit

PAIRS = random_pairs([(3, 4, 5), (6, 2, 7), (2, 8, 3), (4, 4, 4), (5, 3, 2), (7, 6, 5), (3, 3, 6)])


def policy() -> Any:
    """A fresh adapter on the experts too."""
    return add_adapter(
        tiny_model("qwen3_moe", **MIXTURES["qwen3_moe"]), r=4, alpha=8, dropout=0.0, target_modules=["all-linear"],
        target_parameters=["gate_up_proj", "down_proj"], seed=0,
    )  # fmt: skip


def test_stopped_and_continued_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    settings = {"steps": 5, "pairs_per_step": 2}
    model = policy()
    unbroken = run(model, PAIRS, tmp_path / "unbroken", **settings)
    assert unbroken[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and unbroken[-1]["loss"] < unbroken[0]["loss"]
    training = make_training(policy(), PAIRS, tmp_path / "broken", **settings)
    polls = iter(range(10_000))

    def check() -> None:
        if next(polls) >= 3:
            training.stop.handle(signal.SIGTERM, None)
        type(training.stop).check(training.stop)

    training.stop.check = check  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit(training)
    again = policy()
    continued = run(again, PAIRS, tmp_path / "broken", **settings)
    assert [row["loss"] for row in continued] == [row["loss"] for row in unbroken]
    assert all(torch.equal(*both) for both in zip(adapter_weights(again), adapter_weights(model), strict=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small mixture of experts of which only the config is there."""
    changes = MIXTURES["qwen3_moe"] | {"num_experts": 64, "moe_intermediate_size": 256, "hidden_size": 512}
    tiny_config("qwen3_moe", **changes).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def planned(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    assert main(["plan", "--model_name_or_path", str(folder), "--gpu_memory", "80", *options]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_plan_says_how_experts_are_held_and_what_is_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = 2 * 64 * 3 * 256 * 512
    text = planned(capsys, folder)
    assert f"{weights / 1e6:,.1f} M weights are experts' (0.0 GiB, in 4 bit)" in text
    assert "--lora_target_modules k_proj o_proj q_proj v_proj" in text and "--lora_target_parameters" in text
    trained = float(re.findall(r"([\d.]+) M parameters are trained", text)[0])
    in_16_bit = planned(capsys, folder, "--load_in_4bit", "false")
    assert f"{2 * weights / 2**30:.1f} GiB of them not quantized" in in_16_bit
    with_experts = planned(capsys, folder, "--lora_target_parameters", "gate_up_proj,down_proj")
    assert "for each expert, on down_proj gate_up_proj" in with_experts
    added = 2 * 64 * 64 * (512 + 2 * 256 + 256 + 512)  # layers, experts, rank, both sides of both stacks
    assert float(re.findall(r"([\d.]+) M parameters are trained", with_experts)[0]) == pytest.approx(
        trained + added / 1e6, abs=0.1
    )


def test_dropout_on_experts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lora_dropout", "0.1", "--lora_target_parameters", "down_proj"]
    assert main(["plan", "--model_name_or_path", "base", *options]) != 0
    assert "--lora_target_parameters has none" in capsys.readouterr().err


@pytest.mark.parametrize("level", ["selective", "full"])
def test_recomputed_layers_give_the_same_gradients(level: Any) -> None:
    from qlora_dpo.models.activation_checkpointing import set_activation_checkpointing
    from qlora_dpo.models.lora import trainable_parameters

    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for levels in ("none", level):
        model = policy().train()
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.normal_(0, 0.1)
        set_activation_checkpointing(model, levels)
        model(ids).logits.square().mean().backward()
        found.append([parameter.grad for parameter in trainable_parameters(model)])
    assert experts.count_experts(model).weights and all(grad is not None and grad.any() for grad in found[0])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
