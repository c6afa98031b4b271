"""A base built straight on the device is the base that loading gives for the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny import RAGGED, random_pairs, tiny_model, with_lora

from benchmarks.gpu.models import RandomWeights, build_base, build_random_base
from benchmarks.gpu.scale import REAL_SHAPES, TINY_SHAPES
from qlora_dpo.config.training import ModelOptions, quantization_of
from qlora_dpo.data.packing import pack
from qlora_dpo.models.loading import load_base
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import choose_scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The base as it is loaded, and as it is built from the same weights."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param).bfloat16()
    model.save_pretrained(folder)
    weights = model.state_dict()
    loaded = load_base(str(folder), device=CPU, quantization=quantization_of(ModelOptions()))
    return loaded, build_base(model.config, CPU, lambda name, _: weights[name])


def test_modules_and_tensors_are_those_of_loading(both: tuple[Any, Any]) -> None:
    kinds = [{name: type(module).__name__ for name, module in model.named_modules()} for model in both]
    assert kinds[0] == kinds[1]
    states = [model.state_dict() for model in both]
    assert list(states[0]) == list(states[1])
    for name, tensor in states[0].items():
        assert tensor.dtype == states[1][name].dtype and torch.equal(tensor, states[1][name]), name
    buffers = [dict(model.named_buffers()) for model in both]
    assert list(buffers[0]) == list(buffers[1])
    assert all(torch.equal(buffer, buffers[1][name]) for name, buffer in buffers[0].items())


def test_quantization_is_that_of_loading(both: tuple[Any, Any]) -> None:
    layers = [[module for module in model.modules() if isinstance(module, Linear4bit)] for model in both]
    assert len(layers[0]) == len(layers[1]) > 0
    for one, other in zip(*layers, strict=True):
        assert one.compute_dtype == other.compute_dtype and one.support_avx512bf16_for_cpu is False
        assert other.support_avx512bf16_for_cpu is False and other.weight.quant_state is other.quant_state
        states = [layer.weight.quant_state.as_dict(packed=True) for layer in (one, other)]
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
        assert one.weight.quant_state.dtype == other.weight.quant_state.dtype


def test_what_trainers_ask_of_a_loaded_model(both: tuple[Any, Any]) -> None:
    loaded, built = both
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "training", "dtype"):
        assert getattr(built, name) == getattr(loaded, name), name
    assert built.hf_quantizer.is_trainable
    assert built.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_logps_and_gradients_are_those_of_loading(both: tuple[Any, Any]) -> None:
    pairs = random_pairs(RAGGED)
    results = []
    for base in both:
        policy = with_lora(base)
        scorer = choose_scorer(policy, pairs[0], CPU)
        logps = scorer.per_token_logps(policy, pack(pairs, scorer.kind))
        logps.sum().backward()
        results.append([logps, *(parameter.grad for parameter in trainable_parameters(policy))])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in results[1][1:])


def test_random_weights_differ_from_layer_to_layer() -> None:
    base = build_random_base(TINY_SHAPES["70B"], CPU)
    packed = [module.weight.data for module in base.modules() if isinstance(module, Linear4bit)]
    same = [
        torch.equal(one, other) for one in packed for other in packed if one is not other and one.shape == other.shape
    ]
    assert same and not any(same)
    weights = RandomWeights(2**16, CPU, torch.bfloat16)
    values = weights("layer.weight", torch.Size([256, 256])).float()
    assert abs(values.std().item() - 0.02) < 1e-3 and abs(values.mean().item()) < 1e-3
    assert weights("norm.weight", torch.Size([8])).eq(1).all() and weights("q.bias", torch.Size([8])).eq(0).all()
    assert weights("embed.weight", torch.Size([512, 256])).shape == (512, 256)


def test_real_shapes_have_their_published_sizes(tmp_path: Path) -> None:
    from benchmarks.gpu.models import hub_config
    from qlora_dpo.models.loading import model_on_meta

    billions = {name: model_on_meta(hub_config(shape)).num_parameters() / 1e9 for name, shape in REAL_SHAPES.items()}
    assert billions == pytest.approx({"33B": 32.53, "7B": 6.74, "70B": 70.55, "Qwen2.5-7B": 7.62}, abs=0.01)
