"""The self-check at the start of a run: a way of scoring that gives other log-probs is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import RAGGED, random_pairs, tiny_model, with_lora
from torch import Tensor

from qlora_dpo.models import attention, scoring
from qlora_dpo.models.scoring import choose_scorer

CPU = torch.device("cpu")


def test_attention_that_looks_too_far_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole_row(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        rows = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
        attended = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        return attended[0].transpose(0, 1)

    model = with_lora(tiny_model())
    assert choose_scorer(model, random_pairs(RAGGED)[0], CPU).kind == "shared"
    monkeypatch.setattr(attention, "attend", whole_row)
    assert choose_scorer(model, random_pairs(RAGGED)[0], CPU).kind == "padded"


def test_head_of_another_form_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    own = scoring._find_head
    monkeypatch.setattr(scoring, "_find_head", lambda model: scoring.Head(own(model).module, 2.0, None))
    assert choose_scorer(with_lora(tiny_model()), random_pairs(RAGGED)[0], CPU).head is None


@pytest.mark.parametrize(("noise", "kind"), [(-1.0, "padded"), (1.0, "shared")])
def test_a_model_that_rounds_more_is_allowed_more(monkeypatch: pytest.MonkeyPatch, noise: float, kind: str) -> None:
    # Below 0, because on some processors the two ways agree to the last bit.
    monkeypatch.setitem(scoring.TOLERANCE, torch.float32, -1.0)
    monkeypatch.setattr(scoring, "_own_noise", lambda *_: noise)
    assert choose_scorer(with_lora(tiny_model()), random_pairs(RAGGED)[0], CPU).kind == kind


def test_own_noise_is_the_rounding_of_the_plain_path() -> None:
    noise = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = with_lora(tiny_model()).to(dtype).eval()
        pair = max(random_pairs(RAGGED), key=lambda one: abs(len(one.chosen_ids) - len(one.rejected_ids)))
        plain = scoring.pack([pair], "padded")
        with torch.no_grad():
            expected = scoring._own_logps(model.get_base_model(), plain)[0]
            noise[dtype] = scoring._own_noise(model.get_base_model(), pair, expected, CPU)
            assert scoring._own_noise(model.get_base_model(), pair, expected + 1, CPU) > 0.9
    assert noise[torch.float32] < 1e-5 and noise[torch.bfloat16] < 5e-2
