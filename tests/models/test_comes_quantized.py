"""A base that comes quantized is trained as its format allows, or refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.config.training import ModelOptions, quantization_of
from qlora_dpo.errors import ModelError, UsageError
from qlora_dpo.models.loading import load_base, load_config, refuse_untrainable
from qlora_dpo.training.trained_on import load_trained

CPU = torch.device("cpu")
NF4, INT8 = quantization_of(ModelOptions()), {"load_in_8bit": True}
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # OCP MX, E2M1
SETTINGS: dict[str, dict[str, Any]] = {
    "FP8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "GPTQ": {"quant_method": "gptq", "bits": 4},
    "AWQ": {"quant_method": "awq", "bits": 4},
    "MXFP4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "torchao": {"quant_method": "torchao"},
}


def describe(folder: Path, settings: dict[str, Any]) -> Path:
    """Write into config.json that the model comes quantized."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def says_quantized(folder: Path, settings: dict[str, Any]) -> Path:
    tiny_config().save_pretrained(folder)
    return describe(folder, settings)


@pytest.mark.parametrize("held", [NF4, INT8, None], ids=["4bit", "8bit", "16bit"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_other_formats_are_refused_with_the_ways_out(kind: str, held: Any, tmp_path: Path) -> None:
    config = load_config(str(says_quantized(tmp_path, SETTINGS[kind])))
    can_be_held = kind in ("FP8", "MXFP4")
    if can_be_held and held is None:
        refuse_untrainable(str(tmp_path), config, held)
        return
    with pytest.raises(ModelError, match=f"comes quantized as {kind}, .* name the base in 16 bit") as refused:
        refuse_untrainable(str(tmp_path), config, held)
    assert ("--load_in_4bit false" in str(refused.value)) == can_be_held


def test_the_text_part_may_say_it_and_a_card_names_the_original(tmp_path: Path) -> None:
    config = load_config(str(says_quantized(tmp_path, SETTINGS["GPTQ"])))
    part, config.quantization_config = dict(config.quantization_config), None
    refuse_untrainable(str(tmp_path), config, NF4)
    config.get_text_config = lambda: type("Text", (), {"quantization_config": part})()
    (tmp_path / "README.md").write_text("---\nbase_model:\n- someone/original\n---\nSmaller.\n")
    with pytest.raises(ModelError, match=r"GPTQ.*made of \(someone/original, by its README\.md\)"):
        refuse_untrainable(str(tmp_path), config, NF4)


@pytest.mark.parametrize("command", ["plan", "train"])
def test_commands_refuse_before_the_data_is_read(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = says_quantized(tmp_path / "base", SETTINGS["AWQ"])
    tiny_tokenizer().save_pretrained(folder)
    options = ["--model_name_or_path", str(folder), "--dataset", str(tmp_path / "no-such.jsonl"), "--use_cpu", "true"]
    options += ["--output_dir", str(tmp_path / "run")] if command == "train" else []
    assert main([command, *options]) == 65
    assert "comes quantized as AWQ" in capsys.readouterr().err


def block_fp8(folder: Path) -> Any:
    """A LLaMA whose projections are stored as DeepSeek's and Qwen's are: FP8 with a scale for each block."""
    model = tiny_model(num_key_value_heads=4)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name]
        blocks = weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
        scales = blocks.abs().amax((1, 3)) / 448
        tensors[name] = (weight / scales.repeat_interleave(64, 0).repeat_interleave(64, 1)).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder, SETTINGS["FP8"] | {"weight_block_size": [64, 64], "activation_scheme": "dynamic"})
    return model


def mxfp4(folder: Path) -> Any:
    """gpt-oss: experts as pairs of 4-bit numbers with a power of two for each 32 of them."""
    model = tiny_model("gpt_oss", num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "experts" in name and name.endswith("_proj")]:
        runs = tensors.pop(name).transpose(1, 2).unflatten(2, (-1, 32))
        exponents = torch.floor(torch.log2(runs.abs().amax(-1) / 6)) + 1
        codes = ((runs / 2 ** exponents[..., None])[..., None] - FP4_VALUES).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    describe(folder, SETTINGS["MXFP4"])
    return model


@pytest.mark.parametrize("made", [block_fp8, mxfp4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_transformers_can_dequantize_is_held_in_the_runs_type(
    made: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    original = made(tmp_path).state_dict()
    base = load_base(str(tmp_path), device=CPU, dtype=dtype)
    weights = base.state_dict()
    assert weights.keys() == original.keys() and {weight.dtype for weight in weights.values()} == {dtype}
    assert base(input_ids=torch.tensor([[1, 5, 6]])).logits.dtype == dtype
    errors = {name: (weights[name].float() - original[name]).norm() / original[name].norm() for name in original}
    assert max(errors.values()) < 0.15 and max(errors.values()) > 0.01  # rounded, and nothing else
    with pytest.raises(ModelError, match="comes quantized as"):
        load_base(str(tmp_path), device=CPU, quantization=NF4)


@pytest.fixture(scope="module")
def nf4_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA as bitsandbytes saves it in 4 bit."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("models") / "nf4"
    settings = BitsAndBytesConfig(**NF4 or {})
    AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=settings, dtype=torch.bfloat16, device_map={"": CPU}
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("error:You passed `quantization_config`")
def test_what_bitsandbytes_saved_trains_as_its_original_does(
    nf4_folder: Path, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    for name, base in (("stored", nf4_folder), ("here", model_folder)):
        options = ["--model_name_or_path", str(base), "--dataset", str(pairs_file), "--max_steps", "2"]
        assert main(["plan", *options, "--use_cpu", "true"]) == 0
        assert main(["train", *options, "--output_dir", str(tmp_path / name), "--learning_rate", "1e-3"]) == 0
    stored, here = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stored", "here"))
    assert stored.keys() == here.keys() and all(torch.equal(stored[name], here[name]) for name in here)
    load_trained(tmp_path / "stored", use_cpu=True)
    assert main(["merge", "--adapter", str(tmp_path / "stored"), "--output", str(tmp_path / "out")]) == 0


def test_bitsandbytes_in_other_bits_is_refused_with_the_option(nf4_folder: Path, tmp_path: Path) -> None:
    for held in (None, INT8):
        with pytest.raises(UsageError, match=r"comes in 4 bit from bitsandbytes.*use --load_in_4bit true"):
            load_base(str(nf4_folder), device=CPU, quantization=held)
    in_8_bit = load_config(str(says_quantized(tmp_path, {"load_in_8bit": True})))
    with pytest.raises(UsageError, match=r"comes in 8 bit from bitsandbytes.*use --load_in_8bit true"):
        refuse_untrainable(str(tmp_path), in_8_bit, NF4)
    refuse_untrainable(str(tmp_path), in_8_bit, INT8)
