"""What the forward pass keeps changes the memory only: every level, and every mixture, gives the same gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RAGGED, random_pairs, tiny_model, with_lora
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_dpo.data.packing import pack
from qlora_dpo.models import activation_checkpointing
from qlora_dpo.models.activation_checkpointing import LEVELS, Level, decoder_layers, set_activation_checkpointing
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import load_base
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import choose_scorer

CPU = torch.device("cpu")
NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}  # fmt: skip
MIXTURE: tuple[Level, ...] = ("offload", "full", "selective", "none")


class Calls(TorchDispatchMode):
    """Counts the calls of operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return sum(name in called for called in self.names)


def policy(fuse: bool, device: torch.device = CPU, folder: Path | None = None) -> Any:
    base = tiny_model(num_hidden_layers=4)
    if folder is not None:
        base.save_pretrained(folder)
        base = load_base(str(folder), device=device, quantization=NF4, dtype=torch.float32)
    model = with_lora(base).to(device)
    if fuse:
        assert fuse_lora(model) == 28 and make_lean(model) == (9, 4)
    return model.train()


def loss_and_gradients(model: Any, levels: Level | Sequence[Level], device: torch.device = CPU) -> list[torch.Tensor]:
    scorer = choose_scorer(model, random_pairs(RAGGED)[0], device)
    assert set_activation_checkpointing(model, levels) == 4
    logps = scorer.per_token_logps(model, pack(random_pairs(RAGGED), scorer.kind).to(device))
    loss = (logps * torch.linspace(-1, 1, len(logps), device=device)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, trainable_parameters(model))]


@pytest.mark.parametrize("levels", [*LEVELS, MIXTURE, MIXTURE[::-1]], ids=str)
@pytest.mark.parametrize("fuse", [False, True], ids=["peft", "ours"])
@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "nf4"])
def test_every_level_gives_the_same_loss_and_gradients(
    levels: Level | Sequence[Level], fuse: bool, quantized: bool, tmp_path: Path
) -> None:
    model = policy(fuse, folder=tmp_path if quantized else None)
    expected = loss_and_gradients(model, "none")
    assert all(gradient.abs().max() > 0 for gradient in expected)
    for ours, kept in zip(loss_and_gradients(model, levels), expected, strict=True):
        assert torch.equal(ours, kept)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "again"), [("none", 0), ("selective", 0), ("full", 28), ("offload", 28)])
@pytest.mark.parametrize("fuse", [False, True], ids=["peft", "ours"])
def test_selective_runs_no_base_product_and_no_attention_twice(
    level: Level, again: int, fuse: bool, tmp_path: Path
) -> None:
    model = policy(fuse, folder=tmp_path)
    scorer = choose_scorer(model, random_pairs(RAGGED)[0], CPU)
    set_activation_checkpointing(model, level)
    with Calls() as forward:
        logps = scorer.per_token_logps(model, pack(random_pairs(RAGGED), scorer.kind))
    with Calls() as backward:
        logps.sum().backward()
    assert forward.of("bitsandbytes.gemm_4bit") == 28
    assert backward.of("bitsandbytes.gemm_4bit") == again
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert backward.of(attention) == (forward.of(attention) if again else 0)


def test_each_layer_has_its_own_level() -> None:
    model = policy(fuse=False)
    set_activation_checkpointing(model, ("none", "full", "none", "selective"))
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [False, True, False, True]
    with pytest.raises(ValueError, match="2 levels for 4 decoder layers"):
        set_activation_checkpointing(model, ("none", "full"))


@pytest.mark.slow
def test_offload_takes_the_layers_inputs_through_another_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = policy(fuse=True)
    expected = loss_and_gradients(model, "full")
    moved: list[torch.Size] = []

    class Elsewhere(saved_tensors_hooks):
        """`save_on_cpu` for tensors that are on a CPU already: it copies them."""

        def __init__(self, pin_memory: bool) -> None:
            assert pin_memory
            super().__init__(lambda tensor: (moved.append(tensor.shape), tensor.clone())[1], lambda copy: copy)

    monkeypatch.setattr(activation_checkpointing, "save_on_cpu", Elsewhere)
    monkeypatch.setattr(activation_checkpointing, "_is_on_gpu", lambda inputs: True)
    gradients = loss_and_gradients(model, "offload")
    tokens = pack(random_pairs(RAGGED), "shared").input_ids.numel()
    assert moved == [torch.Size([1, tokens, 64])] * 4
    assert all(torch.equal(ours, kept) for ours, kept in zip(gradients, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("levels", [*LEVELS, MIXTURE], ids=str)
def test_every_level_gives_the_same_gradients_on_the_card(levels: Level | Sequence[Level]) -> None:
    device = torch.device("cuda")
    model = policy(fuse=True, device=device)
    expected = loss_and_gradients(model, "none", device)
    for ours, kept in zip(loss_and_gradients(model, levels, device), expected, strict=True):
        torch.testing.assert_close(ours, kept, atol=1e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_keeps_no_layer_input_on_the_card() -> None:
    device = torch.device("cuda")
    model = policy(fuse=True, device=device)
    pairs = random_pairs([(200, 300, 300)] * 4)
    batch = pack(pairs, "shared").to(device)
    scorer = choose_scorer(model, pairs[0], device)
    kept = {}
    for level in ("full", "offload"):
        set_activation_checkpointing(model, level)  # type: ignore[arg-type]
        before = torch.cuda.memory_allocated()
        logps = scorer.per_token_logps(model, batch)
        kept[level] = torch.cuda.memory_allocated() - before
        del logps
    inputs = 4 * batch.input_ids.numel() * 64 * 4
    assert kept["full"] - kept["offload"] >= 0.9 * inputs
