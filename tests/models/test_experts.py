"""Mixtures of experts: in 4 bit they are the dequantized model, gradients included, and LoRA on them is PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from tiny import MIXTURES, RAGGED, random_pairs, tiny_config, tiny_model
from torch import nn

from qlora_dpo.errors import UsageError
from qlora_dpo.models import experts, lora
from qlora_dpo.models.fused_lora import dense_weight, fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import load_base
from qlora_dpo.models.scoring import choose_scorer
from qlora_dpo.models.skeleton import build_skeleton

CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
STACKS = ("gate_up_proj", "down_proj")
FAMILIES = pytest.mark.parametrize("family", MIXTURES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved random model of each family."""
    root = tmp_path_factory.mktemp("mixtures")
    for family, changes in MIXTURES.items():
        tiny_model(family, **changes).save_pretrained(root / family)
    return {family: root / family for family in MIXTURES}


def load(folder: Path, dtype: torch.dtype = torch.float32, quantization: Any = NF4) -> Any:
    return load_base(str(folder), device=CPU, quantization=quantization, dtype=dtype)


def dequantized(base: Any, family: str) -> Any:
    """transformers' own model with the weights that this base holds."""
    plain = tiny_model(family, **MIXTURES[family]).eval()
    layers = dict(plain.named_modules())
    with torch.no_grad():
        for name, layer in base.named_modules():
            if isinstance(layer, Linear4bit):
                layers[name].weight.copy_(dense_weight(layer, torch.float32))
        for full, module, name in experts.stacks_of(base):
            plain.get_parameter(full).copy_(experts.dense_stack(module, name, torch.float32))
    return plain


def adapted(base: nn.Module, parameters: tuple[str, ...], r: int = 4) -> Any:
    """The base with an adapter every number of which matters."""
    policy = lora.add_adapter(
        base, r=r, alpha=8, dropout=0.0, target_modules=["all-linear"], target_parameters=parameters, seed=0
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora.trainable_parameters(policy):
            parameter.normal_(0, 0.05)
    return policy


IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))


@FAMILIES
def test_base_in_4_bit_is_the_dequantized_model(family: str, folders: dict[str, Path]) -> None:
    base = load(folders[family])
    stacks = list(experts.stacks_of(base))
    assert stacks and all(experts.is_packed(module, name) for _, module, name in stacks)
    count = experts.count_experts(base)
    assert not count.unpacked and count.size < 0.6 * count.weights  # NF4 takes half a byte, and scales
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, dequantized(base, family)(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parameters", [(), STACKS], ids=["attention", "experts"])
@FAMILIES
def test_policy_and_its_gradients_are_pefts(family: str, parameters: Any, folders: dict[str, Path]) -> None:
    base = load(folders[family])
    plain = dequantized(base, family)
    policy = adapted(base, parameters)
    modules = list(policy.peft_config["default"].target_modules)
    peft: Any = get_peft_model(
        plain, LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=list(parameters))
    )
    assert not set_peft_model_state_dict(peft, lora.adapter_weights(policy)).unexpected_keys
    theirs = dict(peft.named_parameters())
    ours = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    logits = [model(IDS).logits for model in (policy, peft)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)
    for output in logits:
        output.square().mean().backward()
    for name, value in ours.items():
        torch.testing.assert_close(value.grad, theirs[name].grad, atol=1e-6, rtol=1e-4, msg=name)
    assert all(value.grad is not None and value.grad.any() for value in ours.values())
    with torch.no_grad(), policy.disable_adapter(), peft.disable_adapter():
        torch.testing.assert_close(policy(IDS).logits, peft(IDS).logits, atol=1e-5, rtol=1e-4)


@FAMILIES
def test_by_default_neither_experts_nor_routers_are_trained(family: str, folders: dict[str, Path]) -> None:
    policy = lora.add_adapter(load(folders[family]), r=4, alpha=4, dropout=0.0, target_modules=["all-linear"], seed=0)
    config = policy.peft_config["default"]
    assert not config.target_parameters and "o_proj" in config.target_modules
    names = {name.partition(".lora_")[0] for name, value in policy.named_parameters() if value.requires_grad}
    inside = {name for name in names if ".self_attn." in name or ".shared_expert." in name}
    assert names == inside and (family == "qwen2_moe") == any(".shared_expert." in name for name in names)
    line = lora.describe_experts(experts.count_experts(policy), config)
    assert line is not None and "--lora_target_parameters" in line and "in 4 bit" in line


def test_nothing_dense_is_kept_for_the_backward_pass(folders: dict[str, Path]) -> None:
    policy = adapted(load(folders["mixtral"]), STACKS)
    least = min(experts.stack_shape(module, name).numel() for _, module, name in experts.stacks_of(policy))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.untyped_storage().nbytes() // 4), x)[1],
                                                  lambda x: x):  # fmt: skip
        policy(IDS[:1, :8])
    assert kept and max(kept) < least


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_pairs_share_their_prompt_in_16_bit(family: str, folders: dict[str, Path]) -> None:
    policy = adapted(load(folders[family], torch.bfloat16), STACKS, r=8)
    fuse_lora(policy)
    make_lean(policy)
    scorer = choose_scorer(policy, random_pairs(RAGGED)[0], CPU)
    assert scorer.kind == ("padded" if family == "gpt_oss" else "shared")  # gpt-oss has attention sinks


@pytest.mark.parametrize("r", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_product_is_one_product_per_expert(r: int, dtype: torch.dtype) -> None:
    rows, weights = torch.randn(9, 64, dtype=dtype), torch.randn(4, 64, r, dtype=dtype)
    offsets = torch.tensor([3, 3, 7, 9], dtype=torch.int32)
    found = experts._grouped_mm(rows, weights, offsets)
    places = [slice(0, 3), slice(3, 3), slice(3, 7), slice(7, 9)]
    expected = torch.cat([rows[place] @ weight for place, weight in zip(places, weights, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-2)


@pytest.mark.parametrize("quantization", [NF4, None], ids=["nf4", "none"])
def test_saved_adapter_is_read_again_twice(quantization: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    policy = adapted(load(folders["qwen3_moe"], quantization=quantization), STACKS)
    lora.save_adapter(policy, tmp_path)
    again = lora.load_adapter(load(folders["qwen3_moe"], quantization=quantization), tmp_path, trainable=True)
    lora.add_frozen_reference(again, tmp_path)
    with torch.no_grad():
        expected = policy(IDS).logits
        assert torch.equal(again(IDS).logits, expected)
        for parameter in lora.trainable_parameters(again):
            parameter.add_(0.1)
        assert not torch.allclose(again(IDS).logits, expected, atol=1e-2)
        with lora.reference_active(again):
            assert torch.equal(again(IDS).logits, expected)
        plain = PeftModel.from_pretrained(load(folders["qwen3_moe"], quantization=None), str(tmp_path))
        close = 1e-5 if quantization is None else 10.0  # PEFT cannot put an adapter on experts in 4 bit
        torch.testing.assert_close(plain(IDS).logits, expected, atol=close, rtol=1e-4)


def test_skeleton_counts_what_loading_holds(folders: dict[str, Path]) -> None:
    base = load(folders["qwen3_moe"], torch.bfloat16)
    skeleton = build_skeleton(
        tiny_config("qwen3_moe", **MIXTURES["qwen3_moe"]), quantization=NF4, dtype=torch.bfloat16, r=4,
        target_modules=["all-linear"], target_parameters=STACKS,
    )  # fmt: skip
    counted = skeleton.weights
    assert counted.experts == experts.count_experts(base)
    packed = {id(layer.weight) for layer in base.modules() if isinstance(layer, Linear4bit)}
    packed |= {id(module._parameters[name]) for _, module, name in experts.stacks_of(base)}
    others = sum(p.nbytes for p in base.parameters() if id(p) not in packed) + sum(b.nbytes for b in base.buffers())
    assert counted.other == others
    assert skeleton.adapter_parameters == sum(p.numel() for p in lora.trainable_parameters(adapted(base, STACKS)))


def test_experts_without_quantization_are_said(folders: dict[str, Path]) -> None:
    base = load(folders["mixtral"], torch.bfloat16, quantization={"load_in_8bit": True})
    count = experts.count_experts(base)
    assert count.unpacked == count.size == 2 * count.weights
    assert "GiB of them not quantized" in str(lora.describe_experts(count, LoraConfig(target_modules=["q_proj"])))


def test_unknown_parameter_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"gate_proj: .* its experts' are down_proj, gate_up_proj"):
        adapted(load(folders["mixtral"]), ("gate_proj",))
