"""One model in memory that answers with its adapter off and on, in batches, and says how likely an answer is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.answers import Answer, Row, Sample
from qlora_dpo.data.packing import PackedBatch
from qlora_dpo.data.tokenization import TokenizedPair
from qlora_dpo.errors import ResourceError
from qlora_dpo.labeling.prompts import PromptRow
from qlora_dpo.models.generation import Completion, complete
from qlora_dpo.models.lora import reference_active
from qlora_dpo.models.scoring import choose_scorer
from qlora_dpo.reference.fill import LocalWay, keys_of
from qlora_dpo.reference.local import Score, reference_score
from qlora_dpo.reference.store import Logps

SCORED_TOKENS = 8192  # that go through the model at once


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as the model gets it."""

    id: str
    row: PromptRow
    fact: str | None
    ids: Sequence[int]
    seed: int
    sample_seed: int | None
    """Of an answer at temperature 1; None where none is wanted."""


@dataclass(frozen=True)
class Way:
    """How answers are drawn and rewarded."""

    max_new_tokens: int
    temperature: float
    end_id: int
    beta: float


class Both:
    """Writes and scores the answers of both models to a batch of prompts."""

    def __init__(self, model: Any, tokenizer: Any, way: Way, example: Sequence[int]) -> None:
        """`example` are the ids of any prompt: with them the fastest exact way to score is chosen."""
        self._model, self._tokenizer, self._way = model, tokenizer, way
        self._device: torch.device = model.device
        scorer = choose_scorer(model, TokenizedPair(list(example), list(example[:8]), list(example[-8:])), self._device)
        self._kind = scorer.kind

        def policy(batch: PackedBatch) -> Tensor:
            with torch.no_grad():
                return scorer.per_token_logps(model, batch)

        self._scores: dict[str, Score] = {"policy": policy, "reference": reference_score(model, scorer)}
        self._budget = SCORED_TOKENS

    def __call__(self, batch: Sequence[Asked]) -> list[Row]:
        """The rows of these prompts.

        Raises:
            torch.OutOfMemoryError: so many do not fit.
        """
        way = self._way
        seeds = [asked.seed for asked in batch]
        before, before_seconds = self._write(batch, seeds, way.temperature, is_reference=True)
        after, after_seconds = self._write(batch, seeds, way.temperature, is_reference=False)
        sampled = [asked for asked in batch if asked.sample_seed is not None]
        samples, _ = self._write(sampled, [asked.sample_seed or 0 for asked in sampled], 1.0, is_reference=False)
        pairs = [
            *(_pair(asked, *both) for asked, *both in zip(batch, before, after, strict=True)),
            *(_pair(asked, drawn, drawn) for asked, drawn in zip(sampled, samples, strict=True)),
        ]
        policy, reference = (self._sums(name, pairs) for name in ("policy", "reference"))
        drawn_as = {
            asked.id: Sample(len(drawn.ids), drawn.finish_reason, policy[place][0], reference[place][0])
            for place, (asked, drawn) in enumerate(zip(sampled, samples, strict=True), len(batch))
        }
        return [
            Row(
                id=asked.id,
                prompt=asked.row.prompt,
                category=asked.row.category,
                reference_answer=asked.row.reference_answer,
                origin=asked.row.origin,
                seed=asked.seed,
                before=self._answer(before[place], policy[place][0], reference[place][0], before_seconds, True),
                after=self._answer(after[place], policy[place][1], reference[place][1], after_seconds, False),
                fact=asked.fact,
                sample=drawn_as.get(asked.id),
            )
            for place, asked in enumerate(batch)
        ]

    def _write(
        self, batch: Sequence[Asked], seeds: Sequence[int], temperature: float, *, is_reference: bool
    ) -> tuple[list[Completion], float]:
        """The answers to a batch, and how many seconds each of them took."""
        if not batch:
            return [], 0.0
        started = time.perf_counter()
        with reference_active(self._model) if is_reference else nullcontext():
            found = complete(
                self._model, self._tokenizer, [asked.ids for asked in batch], seeds,
                max_new_tokens=self._way.max_new_tokens, end_token_ids=[self._way.end_id], temperature=temperature,
            )  # fmt: skip
        return found, (time.perf_counter() - started) / len(batch)

    def _sums(self, name: str, pairs: Sequence[TokenizedPair]) -> list[tuple[float, float]]:
        """The log-probs of both answers of each pair under the policy or the reference."""
        known: dict[bytes, Logps] = {}

        def keep(new: Mapping[bytes, Logps]) -> None:
            known.update(new)

        way = LocalWay(self._scores[name], pairs, kind=self._kind, device=self._device, max_tokens=self._budget)
        way(range(len(pairs)), keep)
        self._budget = way.max_tokens
        sums = {key: float(values.astype("float64").sum()) for key, values in known.items()}
        return [(sums[first], sums[second]) for first, second in map(keys_of, pairs)]

    def _answer(self, found: Completion, policy: float, reference: float, seconds: float, is_before: bool) -> Answer:
        own = reference if is_before else policy
        return Answer(
            text=found.text,
            tokens=len(found.ids),
            finish_reason=found.finish_reason,
            logp=own,
            logp_per_token=own / len(found.ids),
            logp_policy=policy,
            logp_reference=reference,
            reward=self._way.beta * (policy - reference),
            seconds=seconds,
        )


def answer_all(
    both: Callable[[Sequence[Asked]], list[Row]], asked: Sequence[Asked], known: set[str], size: int
) -> Iterator[list[Row]]:
    """Rows of all prompts but those whose ids are `known`, batch by batch of up to `size` prompts of similar length.

    A batch does not depend on what is known, so what a kill interrupted goes on to the same answers. From where the
    memory runs out, batches are of half the size.

    Raises:
        ResourceError: not even one prompt fits.
    """
    order = sorted(asked, key=lambda one: (len(one.ids), one.row.number), reverse=True)  # what does not fit comes first
    missing = sum(one.id not in known for one in order)
    seconds = 0.2 if sys.stderr.isatty() else 10
    with tqdm(total=missing, desc="answering", unit=" prompts", mininterval=seconds, file=sys.stderr) as bar:
        start = 0
        while start < len(order):
            batch = order[start : start + size]
            wanted = {one.id for one in batch} - known
            rows = _try(both, batch) if wanted else []
            if rows is None:
                size = _halved(len(batch))
                continue
            start += len(batch)
            if wanted:
                yield [row for row in rows if row.id in wanted]
                bar.update(len(wanted))


def _try(both: Callable[[Sequence[Asked]], list[Row]], batch: Sequence[Asked]) -> list[Row] | None:
    """The rows of a batch; None where the memory runs out."""
    # Not an except block: in there the error's traceback would still hold what did not fit.
    with suppress(torch.OutOfMemoryError):
        return both(batch)
    return None


def _halved(size: int) -> int:
    torch.cuda.empty_cache()  # does nothing where there is no GPU
    if size == 1:
        raise ResourceError(
            "the device ran out of memory with one prompt. Lower --max_new_tokens or --max_prompt_length, or free the "
            "device; the same command goes on behind the answers that are there."
        )
    tqdm.write(f"out of memory: from here on {size // 2} prompts are answered at once", file=sys.stderr)
    return size // 2


def _pair(asked: Asked, first: Completion, second: Completion) -> TokenizedPair:
    return TokenizedPair(list(asked.ids), list(first.ids), list(second.ids))
