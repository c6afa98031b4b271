"""A base's tensors are read as loading it would hold them, and merged as PEFT would do it in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from release.tiny_adapters import CPU, MOE, logits, merged, save_adapter, save_base
from safetensors.torch import load_file, save_file
from tiny import MIXTURES, tiny_model, with_lora
from torch import nn

from qlora_dpo.errors import ModelError, UsageError
from qlora_dpo.models import experts
from qlora_dpo.models.loading import load_base, load_config
from qlora_dpo.release.artefact import open_artefact
from qlora_dpo.release.merging.base_weights import BaseWeights
from qlora_dpo.release.merging.merge import recipes_of
from qlora_dpo.release.merging.weights import OutOfRange, Recipe, prepare_merge

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
QUANTIZATIONS = {
    "nf4, double": NF4 | {"bnb_4bit_use_double_quant": True},
    "nf4": NF4 | {"bnb_4bit_use_double_quant": False},
    "fp4": NF4 | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "8 bit": {"load_in_8bit": True},
    "none": None,
}


def in_memory(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of a loaded base in float32, dequantized; the expected value of all reading."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if key in experts.STACKS:
                found[f"{name}.{key}"] = experts.dense_stack(module, key, torch.float32)
                continue
            is_quantized = type(parameter).__name__ in {"Params4bit", "Int8Params"}
            weight: Any = dequantize_module_weight(module) if is_quantized else parameter.data
            if is_quantized and issubclass(module.source_cls, Conv1D):  # type: ignore[arg-type]
                weight = weight.T
            found[f"{name}.{key}"] = weight.float()
    return found


def check_held(folder: Path, quantization: dict[str, Any] | None, dtype: torch.dtype) -> BaseWeights:
    """What is read of the folder is, bit for bit, what loading it holds."""
    base = BaseWeights(folder, load_config(str(folder)), quantization=quantization, dtype=dtype, device=CPU)
    expected = in_memory(load_base(str(folder), device=CPU, quantization=quantization, dtype=dtype))
    assert {tensor.parameter for tensor in base.tensors} <= expected.keys()
    for tensor in base.tensors:
        wanted = {tensor.name: expected[tensor.parameter]}
        if not tensor.is_whole:
            wanted = base.parts.apart(tensor.parameter, expected[tensor.parameter])
        assert torch.equal(base.held(tensor), wanted[tensor.name]), tensor.name
    return base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS.keys())
def test_base_is_read_as_training_held_it(quantization: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    base = check_held(save_base(tmp_path, "qwen2"), quantization, dtype)
    stored = {tensor.parameter: base.original(tensor) for tensor in base.tensors}
    name = "model.layers.0.self_attn.q_proj"
    held = {tensor.parameter: base.held(tensor) for tensor in base.tensors}
    assert torch.equal(held[f"{name}.weight"], stored[f"{name}.weight"]) == (
        quantization is None and dtype == torch.float32
    )
    assert base.is_held_as_stored == (quantization is None and dtype == torch.float32)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {"n_embd": 64, "n_inner": 128, "tie_word_embeddings": True}), ("qwen2_moe", MOE), ("phi3", {}),
     ("gemma3_text", {"tie_word_embeddings": True}), ("mixtral", MIXTURES["mixtral"]),
     ("gpt_oss", MIXTURES["gpt_oss"])],
)  # fmt: skip
def test_architectures_are_read_as_training_held_them(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    check_held(save_base(tmp_path, family, **changes), QUANTIZATIONS["nf4, double"], torch.bfloat16)


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["nf4, double", "fp4", "8 bit"])
def test_base_that_comes_quantized_is_read_as_training_held_it(kind: str, own: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**QUANTIZATIONS[kind])
    plain = save_base(tmp_path / "plain", dtype=own)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, dtype=own).save_pretrained(
        tmp_path / "base"
    )
    base = check_held(tmp_path / "base", QUANTIZATIONS[kind], torch.bfloat16)
    assert base.comes_quantized and any(tensor.companions for tensor in base.tensors)


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("llama", {}, {"target_modules": "all-linear", "use_rslora": True}),
        ("llama", {}, {"target_modules": "all-linear", "use_dora": True}),
        ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
        ("llama", {}, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2},
                       "alpha_pattern": {"v_proj": 32}}),
        ("llama", {}, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
        ("llama", {}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"tie_word_embeddings": True}, {"target_modules": "all-linear"}),
        ("qwen2", {}, {"target_modules": "all-linear", "bias": "all"}),
        ("qwen2", {}, {"target_modules": ["q_proj"], "lora_bias": True}),
        ("gpt2", {"n_embd": 64, "n_inner": 128, "tie_word_embeddings": True},
         {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("qwen2_moe", MOE, {"target_modules": "all-linear"}),
        ("mixtral", {"num_local_experts": 4}, {"target_modules": ["q_proj", "o_proj"]}),
        ("phi3", {}, {"target_modules": "all-linear"}),
        ("gemma3_text", {"tie_word_embeddings": True}, {"target_modules": "all-linear"}),
    ],
)  # fmt: skip
def test_merging_into_the_original_base_is_what_peft_does_in_memory(
    family: str, changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    policy = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base", family, **changes), **options)
    trained = logits(policy)
    found, updates = merged(tmp_path / "merged", tmp_path / "adapter")
    in_peft = policy.merge_and_unload()
    in_peft.save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert updates and all(update.size > 0.01 and update.kept > 0.999 for update in updates)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == torch.float32 and (logits(plain) - trained).abs().max() < 2e-5
    assert plain.config.tie_word_embeddings == in_peft.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("options", "is_tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    ],
)
def test_adapter_on_tied_embeddings_gives_what_was_trained(
    options: dict[str, Any], is_tied: bool, tmp_path: Path
) -> None:
    """PEFT's own merge adds to the shared weight, and so to both embeddings, or twice: it is no expected value here."""
    from transformers import AutoModelForCausalLM

    policy = save_adapter(tmp_path / "adapter", save_base(tmp_path / "base", tie_word_embeddings=True), **options)
    found, _ = merged(tmp_path / "merged", tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.tie_word_embeddings == is_tied == ("lm_head.weight" not in found)
    assert (logits(plain) - logits(policy)).abs().max() < 2e-5


def test_layer_update_says_what_storage_keeps(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    small = {name: tensor * (0.02 if "lora_B" in name else 1) for name, tensor in tensors.items()}
    save_file(small, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    updates = {
        dtype: merged(tmp_path / str(dtype), tmp_path / "adapter", Recipe("original", dtype))[1][0]
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    full = updates[torch.float32]
    name = "model.layers.0.self_attn.q_proj"
    b, a = (small[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA")
    update = 2 * b @ a
    files = (load_file(file) for file in sorted(base.glob("*.safetensors")))
    weight = next(tensors[f"{name}.weight"] for tensors in files if f"{name}.weight" in tensors).float()
    assert full.name == f"{name}.weight" and full.size == pytest.approx((update.norm() / weight.norm()).item(), 1e-4)
    stored = (weight + update).bfloat16()
    kept = torch.cosine_similarity((stored.float() - weight).flatten(), update.flatten(), dim=0).item()
    assert updates[torch.bfloat16].kept == pytest.approx(kept, 1e-4) and kept < updates[torch.float16].kept < full.kept
    assert updates[torch.bfloat16].lost == pytest.approx((stored == weight.bfloat16()).float().mean().item())
    assert full.lost < updates[torch.float16].lost < updates[torch.bfloat16].lost


def test_layer_whose_update_is_zero_loses_nothing(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.float32)
    with_lora(tiny_model(), zero=True).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    named = {"base_model_name_or_path": str(base)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | named))
    updates = merged(tmp_path / "merged", tmp_path / "adapter", Recipe("original", torch.bfloat16))[1]
    assert {(update.size, update.kept, update.lost) for update in updates} == {(0.0, 1.0, 0.0)}


def test_families_that_overflow_in_float16_are_not_stored_in_it(tmp_path: Path) -> None:
    types = {}
    for family in ("llama", "gemma2"):
        base = save_base(tmp_path / family, family, dtype=torch.float16)
        config = load_config(str(base))
        types[family] = BaseWeights(base, config, quantization=None, dtype=torch.bfloat16, device=CPU).half_types
    assert types == {"llama": (torch.float16, torch.bfloat16), "gemma2": (torch.bfloat16,)}


def test_config_says_what_is_stored_and_nothing_of_quantization(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.5, "do_sample": true}')
    config = json.loads((base / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "code.C"}}))
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    merged(tmp_path / "merged", tmp_path / "adapter", Recipe("train", torch.float16))
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written == {name: value for name, value in config.items() if name != "torch_dtype"} | {"dtype": "float16"}
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()
    modes = {path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert modes == {(base / "config.json").stat().st_mode}


def test_tied_embeddings_that_are_stored_twice_are_stored_once(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True, shard="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    found, _ = merged(tmp_path / "merged", tmp_path / "adapter")
    assert "lm_head.weight" not in found and len(found) == len(tensors) - 1


def test_tensors_that_transformers_has_no_place_for_pass_unchanged(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shard="1GB")
    tensors = load_file(base / "model.safetensors")
    extra = {"mtp.weight": torch.full((3,), 1.001), "steps": torch.tensor([7])}
    save_file(tensors | extra, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    found, _ = merged(tmp_path / "merged", tmp_path / "adapter", Recipe("train", torch.bfloat16))
    assert torch.equal(found["mtp.weight"], extra["mtp.weight"]) and torch.equal(found["steps"], extra["steps"])
    assert found["model.norm.weight"].dtype == torch.bfloat16


def test_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shard="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(OutOfRange, match=r"model\.norm\.weight has a weight of 7e\+04, and float16 ends at 65504"):
        merged(tmp_path / "merged", tmp_path / "adapter", Recipe("original", torch.float16))


def test_base_that_a_cpu_cannot_quantize_rightly_can_only_be_merged_into_as_stored(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base", intermediate_size=96), target_modules=["q_proj"])
    prepared = prepare_merge(open_artefact(tmp_path / "adapter"), CPU)
    with pytest.raises(UsageError, match="96 input features, not a multiple of 64"):
        recipes_of(prepared, "train", "float32")
    assert [recipe.name for recipe in recipes_of(prepared, "original", "float32")] == ["original, float32"]


def changed_adapter(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def test_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = tmp_path / "adapter"
    save_adapter(adapter, base, target_modules=["q_proj"])
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    good = load_file(adapter / "adapter_model.safetensors")
    for other, said in (
        ({name: tensor for name, tensor in good.items() if name != first}, "layers.0.self_attn.q_proj.lora_A"),
        (good | {first.replace("layers.0", "layers.9"): good[first].clone()}, "layers.9.self_attn.q_proj"),
        (good | {first: torch.zeros(4, 32)}, "size mismatch|shape"),
    ):
        changed_adapter(adapter, lambda _, other=other: other)
        with pytest.raises(ModelError, match=said):
            prepare_merge(open_artefact(adapter), CPU)
    changed_adapter(adapter, lambda _: good | {first: torch.full_like(good[first], torch.nan)})
    with pytest.raises(ModelError, match=r"q_proj\.weight cannot be merged: NaN"):
        merged(tmp_path / "merged", adapter)


def test_bias_that_the_base_has_no_place_for_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"), target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(ModelError, match=r"lora_bias trained a bias of model\.layers\.0\.self_attn\.q_proj"):
        prepare_merge(open_artefact(tmp_path / "adapter"), CPU)


def test_base_with_other_shapes_than_its_config_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 192}))
    with pytest.raises(ModelError, match=r"mlp\.\w+_proj\.weight has the shape .* config\.json says"):
        prepare_merge(open_artefact(tmp_path / "adapter"), CPU)
