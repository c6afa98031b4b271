"""The count without weights against the published arithmetic and against what a real model keeps."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IdPair, random_pairs, tiny_config, tiny_model
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_dpo.data.packing import LayoutKind, pack
from qlora_dpo.models import activation_checkpointing
from qlora_dpo.models.activation_checkpointing import Level, set_activation_checkpointing
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import load_base
from qlora_dpo.models.lora import add_adapter, trainable_parameters
from qlora_dpo.models.memory import Activations, count_activations
from qlora_dpo.models.scoring import choose_scorer
from qlora_dpo.models.skeleton import Skeleton, build_skeleton

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip
PAIRS = random_pairs([(20, 90, 70), (33, 60, 80)], vocabulary=512)
GB = 1e9


def nf4(double: bool = True, dtype: str = "bfloat16") -> dict[str, Any]:
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
    }  # fmt: skip


def llama(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int) -> Any:
    return tiny_config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=128, intermediate_size=intermediate, vocab_size=vocabulary,
    )  # fmt: skip


def llama_33b() -> Any:
    return llama(6656, 60, 52, 52, 17920, 32000)


def skeleton_of(config: Any, *, r: int = 64, quantization: Any = None, dtype: torch.dtype = torch.bfloat16) -> Skeleton:
    return build_skeleton(config, quantization=quantization, dtype=dtype, r=r, target_modules=["all-linear"])


@pytest.mark.slow
def test_33b_in_4_bit_weighs_what_the_arithmetic_says() -> None:
    started = time.process_time()
    skeleton = skeleton_of(llama_33b(), quantization=nf4())
    counted = count_activations(skeleton, random_pairs([(300, 400, 400)] * 4), "shared", "cuda")
    assert time.process_time() - started < 20  # about 3 seconds
    assert skeleton.weights.quantized / GB == pytest.approx(16.56, abs=0.01)
    assert skeleton.weights.other / GB == pytest.approx(0.85, abs=0.01)
    assert skeleton.weights.largest == 6656 * 17920 * 2
    assert skeleton.adapter_parameters / 1e6 == pytest.approx(487.6, abs=0.1)
    assert skeleton.weights.active_parameters / GB == pytest.approx(32.10, abs=0.01)
    tokens = counted.tokens
    per_token = {level: sum(layers) / tokens / 1e6 for level, layers in counted.layers.items()}
    assert per_token["full"] == pytest.approx(0.80, abs=0.01)
    assert 8 < per_token["selective"] < 10.5 and per_token["selective"] < per_token["none"] < 18.5
    assert per_token["offload"] == 0 and counted.host == tokens * 6656 * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "double", "single", "other", "per_rank"),
    [
        ((4096, 32, 32, 32, 11008, 32000), 3.34, 3.64, 0.52, 2.50),
        ((4096, 32, 32, 8, 14336, 128256), 3.60, 3.93, 2.10, 2.62),
        ((8192, 80, 64, 8, 28672, 128256), 35.31, 38.50, 4.20, 12.94),
    ],
    ids=["7B", "8B", "70B"],
)
def test_weights_and_adapters_of_other_models(
    shape: tuple[int, ...], double: float, single: float, other: float, per_rank: float
) -> None:
    config = llama(*shape)
    for doubled, expected in ((True, double), (False, single)):
        skeleton = skeleton_of(config, r=1, quantization=nf4(doubled))
        assert skeleton.weights.quantized / GB == pytest.approx(expected, abs=0.01)
        assert skeleton.weights.other / GB == pytest.approx(other, abs=0.01)
        assert skeleton.adapter_parameters / 1e6 == pytest.approx(per_rank, abs=0.01)


def tensors_of(module: torch.nn.Module) -> int:
    """Bytes of the frozen weights of a loaded model, quantization constants included."""
    found: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code]
            found += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return sum(tensor.nbytes for tensor in found)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, nf4(), nf4(double=False)], ids=["16 bit", "nf4 double", "nf4"])
def test_weights_equal_the_loaded_models(quantization: Any, tmp_path: Path) -> None:
    tiny_model(**SHAPE).save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path), device=CPU, quantization=quantization)
    weights = skeleton_of(tiny_config(**SHAPE), quantization=quantization).weights
    assert weights.quantized + weights.other == tensors_of(loaded)


class Kept(TorchDispatchMode):
    """Bytes of the outputs that selective checkpointing keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        if operation in activation_checkpointing._dear_operations():
            self.bytes += sum(t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        return result


def measured(model: Any, pairs: list[IdPair], level: Level, kind: LayoutKind) -> int:
    """Bytes that a real forward pass saves: each storage once, without weights; and what selective keeps besides."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    known |= {
        p.quant_state.absmax.untyped_storage().data_ptr() for p in model.parameters() if hasattr(p, "quant_state")
    }
    held: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    scorer = choose_scorer(model, pairs[0], CPU)
    assert scorer.kind == kind
    set_activation_checkpointing(model.train(), level)
    batch = pack(pairs, kind)
    with Kept() as kept, saved_tensors_hooks(note, lambda tensor: tensor):
        logps = scorer.per_token_logps(model, batch)
    total = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    assert logps.requires_grad
    return total + (kept.bytes if level == "selective" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_predicted_activations_are_what_a_real_model_saves(
    family: str, dtype: torch.dtype, quantized: bool, tmp_path: Path
) -> None:
    quantization = nf4(dtype=str(dtype).removeprefix("torch.")) if quantized else None
    tiny_model(family, **SHAPE).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), device=CPU, quantization=quantization, dtype=dtype)
    policy = add_adapter(base, r=8, alpha=8, dropout=0.0, target_modules=["all-linear"], seed=0)
    fuse_lora(policy)
    make_lean(policy)
    skeleton = skeleton_of(tiny_config(family, **SHAPE), r=8, quantization=quantization, dtype=dtype)
    counted = count_activations(skeleton, PAIRS, "shared", "cpu")
    assert set(counted.layers) == {"none", "selective", "full"}  # a CPU has nowhere to offload to
    for level in counted.layers:
        real = measured(policy, PAIRS, level, "shared")
        assert counted.kept([level] * 6) == pytest.approx(real, rel=0.05)


def test_adapter_of_the_skeleton_is_the_real_ones() -> None:
    real = add_adapter(tiny_model(), r=8, alpha=8, dropout=0.0, target_modules=["q_proj", "up_proj"], seed=0)
    skeleton = build_skeleton(
        tiny_config(), quantization=None, dtype=torch.float32, r=8, target_modules=["q_proj", "up_proj"]
    )
    assert skeleton.adapter_parameters == sum(parameter.numel() for parameter in trainable_parameters(real))
    assert skeleton.adapter_bytes == sum(parameter.nbytes for parameter in trainable_parameters(real))


def test_building_a_skeleton_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    skeleton_of(tiny_config())
    assert torch.equal(torch.get_rng_state(), before)


def test_peak_of_a_mixture_counts_what_is_alive_then() -> None:
    counted = Activations(
        tokens=1,
        layers={"none": (100, 100), "full": (10, 10)},
        outside={"none": 5, "full": 5},
        working={"none": 20, "full": 120},
        head_tile=0,
        host=0,
    )
    assert counted.peak(("none", "none")) == 205 + 20
    assert counted.peak(("full", "none")) == 115 + 20  # the second layer's 100 are free when the first runs again
    assert counted.peak(("none", "full")) == 115 + 120
    more = replace(counted, outside={"none": 5, "full": 8})
    assert more.kept(("none", "none")) == 205 and more.kept(("full", "none")) == 118
