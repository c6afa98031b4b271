"""Batched generation with the one model in memory, adapter on or off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from qlora_dpo.models.lora import reference_active


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    use_reference: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 32,
    pause: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answers to `prompts` (token ids that end where the answer begins), in their order; greedy at temperature 0.

    Prompts of similar length share a batch. `pause` is called after each token and may raise to stop there. The global
    random state is left as it was.
    """
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(),
            reference_active(model) if use_reference else nullcontext(),
        ):
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                numbers = order[start : start + batch_size]
                batch = [prompts[number] for number in numbers]
                ids = _generate_batch(model, tokenizer, batch, max_new_tokens, end_token_ids, temperature, pause)
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                for number, text in zip(numbers, texts, strict=True):
                    answers[number] = text.strip()
    finally:
        model.train(was_training)
    return answers


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    temperature: float,
    pause: Callable[[], None],
) -> torch.Tensor:
    """New token ids [B, <= max_new_tokens] of left-padded prompts."""
    from transformers import StoppingCriteriaList

    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    device = model.device
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

    def never_enough(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        pause()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output: torch.Tensor = model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad,
        eos_token_id=list(ends), stopping_criteria=StoppingCriteriaList([never_enough]), **sampling,
    )  # fmt: skip
    return output[:, width:]
