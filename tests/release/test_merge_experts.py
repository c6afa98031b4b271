"""Adapters on experts are merged as PEFT merges them, however the experts are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from release.tiny_adapters import ORIGINAL, logits, merged, save_adapter, save_base
from tiny import MIXTURES
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_merged_as_by_peft(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", family, **MIXTURES[family])
    parameters = ["gate_up_proj", "down_proj"]
    policy = save_adapter(
        tmp_path / "adapter", base, target_modules=["o_proj"], target_parameters=parameters, **options
    )
    _, updates = merged(tmp_path / "merged", tmp_path / "adapter", ORIGINAL)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = policy.merge_and_unload()
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-5, rtol=1e-5)
    for name, weight in found.named_parameters():
        torch.testing.assert_close(weight, expected.get_parameter(name), atol=1e-6, rtol=1e-6, msg=name)
    assert any(".experts." in update.name for update in updates)
    assert all(update.size > 0 and update.kept > 0.99 for update in updates)


def test_names_of_transformers_4_mean_the_experts_and_the_router(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "mixtral", **MIXTURES["mixtral"])
    policy = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "gate", "w1", "w2", "w3"])
    assert policy.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj", "gate.weight"}
    merged(tmp_path / "merged", tmp_path / "adapter", ORIGINAL)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(found), logits(policy.merge_and_unload()), atol=1e-5, rtol=1e-5)
