"""Nothing computes in float16: no option asks for it, and a base that is stored in it is converted."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, with_lora
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dpo.cli import main
from qlora_dpo.config.training import ModelOptions, TrainConfig, quantization_of
from qlora_dpo.models.loading import load_base
from qlora_dpo.models.lora import load_adapter, save_adapter
from qlora_dpo.training.policy import load_policy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored_in_float16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "half"
    tiny_model().half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Watch(TorchDispatchMode):
    """Notes every operation that makes a float16 tensor out of others."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        if any(isinstance(part, torch.Tensor) and part.dtype == torch.float16 for part in parts):
            self.found.append(str(function))
        return result


def operations_in_float16(model: Any) -> list[str]:
    """Of a forward and a backward pass."""
    watch = Watch()
    with watch:
        logits = model(input_ids=torch.tensor([[1, 5, 6, 7]])).logits
        logits.float().log_softmax(-1)[..., 0].sum().backward()
    return watch.found


DTYPES, BASES = ("auto", "bfloat16", "float32"), ({}, {"load_in_4bit": False})


@pytest.mark.parametrize(("dtype", "base"), list(product(DTYPES, BASES)), ids=str)
def test_base_that_is_stored_in_float16_is_trained_in_another_type(
    dtype: Any, base: dict[str, Any], stored_in_float16: Path
) -> None:
    options = replace(ModelOptions(model_name_or_path=str(stored_in_float16), dtype=dtype), **base)
    policy = load_policy(TrainConfig(model=options), CPU)
    tensors = [*policy.named_parameters(), *policy.named_buffers()]
    assert len(tensors) > 20 and [name for name, tensor in tensors if tensor.dtype == torch.float16] == []
    assert operations_in_float16(policy) == []
    assert policy.get_base_model().dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)


@pytest.mark.parametrize(("dtype", "four", "eight"), list(product(DTYPES, (True, False), (True, False))))
def test_no_options_ask_for_float16(dtype: Any, four: bool, eight: bool) -> None:
    quantization = quantization_of(ModelOptions(dtype=dtype, load_in_4bit=four, load_in_8bit=eight))
    assert "float16" not in [str(value) for value in (quantization or {}).values()]


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_base_that_comes_quantized_for_float16_computes_in_the_runs_type(
    stored_in_float16: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)
    quantized = AutoModelForCausalLM.from_pretrained(
        stored_in_float16, quantization_config=settings, dtype=torch.float16, device_map={"": CPU}
    )
    quantized.save_pretrained(tmp_path)
    model = load_base(str(tmp_path), device=CPU, quantization=quantization_of(ModelOptions()), dtype=torch.bfloat16)
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert layers and {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16 and operations_in_float16(with_lora(model)) == []


def test_adapter_that_is_stored_in_float16_is_trained_in_float32(tmp_path: Path) -> None:
    source = with_lora(tiny_model())
    for parameter in source.parameters():
        parameter.data = parameter.data.half()
    save_adapter(source, tmp_path)
    policy = load_adapter(tiny_model(), tmp_path, trainable=True)
    trained = {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad}
    assert trained == {torch.float32}


@pytest.mark.parametrize("value", ["float16", "fp16", "half", "torch.float16"])
@pytest.mark.parametrize("form", ["flag", "yaml"])
def test_asking_for_float16_is_answered_with_the_reason(
    value: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(f"dtype: {value}\n")
    arguments = ["--dtype", value] if form == "flag" else ["--config", str(tmp_path / "recipe.yaml")]
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --dtype {value}: float16 is not offered") and error.count("\n") == 1
    assert "overflow" in error and "bfloat16" in error


@pytest.mark.parametrize("line", ["fp16: true", "bnb_4bit_compute_dtype: float16", "torch_dtype: float16"])
def test_other_names_for_it_are_answered_too(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(line + "\n")
    name, _, value = line.partition(": ")
    for arguments in (["--config", str(tmp_path / "recipe.yaml")], [f"--{name}", value]):
        assert main(["train", *arguments]) == 2
        error = capsys.readouterr().err
        assert "--dtype" in error and error.count("\n") == 1 and "Traceback" not in error


def test_merge_still_stores_float16_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", "--adapter", "/no/such", "--output", "/no/other", "--dtype", "float16"]) == 74
    assert main(["merge", "--adapter", "/no/such", "--output", "/no/other", "--dtype", "fp16"]) == 2
    assert "not offered" not in capsys.readouterr().err
