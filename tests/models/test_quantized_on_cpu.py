"""bitsandbytes on a CPU: the two traps are held, and the base stays bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merged_in_memory import merged_weights
from tiny import RAGGED, random_pairs, tiny_config, tiny_model, with_lora
from training.runs import CPU, adapter_weights, run

from qlora_dpo.data.packing import pack
from qlora_dpo.errors import UsageError
from qlora_dpo.models.generation import generate
from qlora_dpo.models.loading import check_cpu_quantizable, load_base
from qlora_dpo.models.lora import reference_active, trainable_parameters
from qlora_dpo.models.scoring import Scorer, choose_scorer

NF4 = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def quantized(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(str(folder), device=CPU, quantization=NF4, dtype=dtype)


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}


def dequantized_twin(model: Any) -> Any:
    """The same network with plain fp32 linear layers in place of the 4-bit ones."""
    twin = tiny_model()
    twin.load_state_dict(merged_weights(model))
    return twin


def gradient(model: Any, scorer: Scorer) -> torch.Tensor:
    model.train()
    logps = scorer.per_token_logps(model, pack(random_pairs(RAGGED), scorer.kind))
    grads = torch.autograd.grad((logps * torch.linspace(-1, 1, len(logps))).sum(), trainable_parameters(model))
    return torch.cat([grad.flatten() for grad in grads])


def test_gradient_after_an_evaluation_is_the_dequantized_models_gradient(base_folder: Path) -> None:
    base = quantized(base_folder)
    policy = with_lora(base, zero=True)
    twin = with_lora(dequantized_twin(policy), zero=True)
    for model in (policy, twin):  # the same adapter, with B away from 0 so that A gets a gradient too
        torch.manual_seed(9)
        for parameter in trainable_parameters(model):
            parameter.data.normal_(0, 0.05)
    scorer = choose_scorer(policy, random_pairs(RAGGED)[0], CPU)  # an eval() forward without gradients
    generate(policy, _Decoder(), [[1, 5, 6]], max_new_tokens=2, end_token_ids=[2])
    with torch.no_grad(), reference_active(policy):
        scorer.per_token_logps(policy, pack(random_pairs(RAGGED), scorer.kind))
    ours, expected = (
        gradient(policy, scorer),
        gradient(twin, choose_scorer(twin, random_pairs(RAGGED)[0], CPU)),
    )
    assert expected.norm() > 0.1
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_dequantized_weights_are_near_the_original(base_folder: Path) -> None:
    original = tiny_model().state_dict()
    twin = dequantized_twin(with_lora(quantized(base_folder), zero=True)).state_dict()
    errors = [
        ((twin[name] - weight).norm() / weight.norm()).item() for name, weight in original.items() if "proj" in name
    ]
    assert 0.05 < min(errors) and max(errors) < 0.13  # NF4 rounds by about 0.09; the trap gives 0.4 to 0.9


@pytest.mark.parametrize("size", [32, 48, 96, 160])
def test_rows_that_are_not_whole_blocks_are_refused_by_name(size: int) -> None:
    config = tiny_config(intermediate_size=size)
    with pytest.raises(UsageError, match=rf"model.layers.0.mlp.down_proj has {size} input features"):
        check_cpu_quantizable(config)


def test_whole_blocks_are_accepted() -> None:
    check_cpu_quantizable(tiny_config(intermediate_size=192))


def test_only_lora_weights_move_and_the_nf4_base_stays_bit_for_bit(base_folder: Path, tmp_path: Path) -> None:
    model = with_lora(quantized(base_folder, torch.bfloat16), zero=True)
    before, adapter = base_weights(model), adapter_weights(model)
    run(model, random_pairs(RAGGED * 2), tmp_path / "run", steps=4, pairs_per_step=5, eval_steps=2)
    after = base_weights(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(new, old) for new, old in zip(adapter_weights(model), adapter, strict=True))


class _Decoder:
    """The part of a tokenizer that generation needs."""

    pad_token_id = 0

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in ids]
