"""Batched generation with the one model in memory, adapter on or off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qlora_dpo.models.lora import reference_active
from qlora_dpo.models.positions import room_for_answer


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer, and whether the model ended it or the limit did."""

    text: str
    finish_reason: Literal["stop", "length"]
    ids: tuple[int, ...]
    """What the model wrote, up to the end token and with it."""


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


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    temperature: float,
    watch: Callable[[torch.Tensor], None] = lambda ids: None,
    look: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> list[Completion]:
    """One answer to each prompt, all in one batch; each is drawn by its own seed, whatever else is in the batch.

    The model must be in `eval()`. `watch` gets all new ids [B, T] after each token and may raise to stop there. `look`
    gets, at temperature 0, ids and logits [B, V] before each token and returns the logits.
    """
    draw = _DrawBySeed(seeds, temperature, max_new_tokens, model.device) if temperature > 0 else look
    with torch.no_grad():
        ids = _generate_batch(
            model, tokenizer, list(prompts), max_new_tokens, end_token_ids, 0.0, draw=draw, watch=watch
        )
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        _completion(text.strip(), written, set(end_token_ids))
        for text, written in zip(texts, ids.tolist(), strict=True)
    ]


def _completion(text: str, ids: Sequence[int], ends: set[int]) -> Completion:
    """The answer of one row of a batch, behind whose end there is padding."""
    end = next((place for place, id_ in enumerate(ids) if id_ in ends), None)
    return Completion(text, "length", tuple(ids)) if end is None else Completion(text, "stop", tuple(ids[: end + 1]))


class _DrawBySeed:
    """A logits processor that leaves one token to choose, drawn by inverting the distribution at a number which depends
    on nothing but the row's seed and the token's place."""

    def __init__(self, seeds: Sequence[int], temperature: float, max_new_tokens: int, device: torch.device) -> None:
        self._temperature = temperature
        self._place = 0
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        numbers = [torch.rand(max_new_tokens, generator=generator, dtype=torch.float64) for generator in generators]
        self._numbers = torch.stack(numbers).to(device)

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # In double precision, so that the number stays below the sum and no token without probability is drawn.
        sums = torch.softmax(scores.float() / self._temperature, dim=-1).double().cumsum(dim=-1)
        number = self._numbers[:, self._place, None] * sums[:, -1:]
        self._place += 1
        drawn = torch.searchsorted(sums, number, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
    temperature: float,
    pause: Callable[[], None] = lambda: None,
    draw: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    watch: Callable[[torch.Tensor], None] = lambda ids: None,
) -> torch.Tensor:
    """New token ids [B, <= max_new_tokens] of left-padded prompts; `draw` chooses them in place of transformers."""
    from transformers import LogitsProcessorList, StoppingCriteriaList

    width = max(len(prompt) for prompt in prompts)
    max_new_tokens = room_for_answer(model, width, max_new_tokens)
    pad = tokenizer.pad_token_id
    device = model.device
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)

    def never_enough(ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        pause()
        watch(ids[:, width:])
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    if draw:  # nothing but the temperature changes the model's distribution, whatever its generation_config.json says
        sampling |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    output: torch.Tensor = model.generate(
        input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad,
        eos_token_id=list(ends), stopping_criteria=StoppingCriteriaList([never_enough]),
        logits_processor=LogitsProcessorList([draw] if draw else []), **sampling,
    )  # fmt: skip
    return output[:, width:]
