"""Answers one prompt twice, adapter off and adapter on, and tells what is written while it is being written."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from eval.page.limits import LONGEST_PROMPT, MAX_SECONDS
from qlora_dpo.data.packing import PackedBatch
from qlora_dpo.data.preferences import Message
from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair
from qlora_dpo.models.generation import Completion, complete
from qlora_dpo.models.lora import reference_active
from qlora_dpo.models.scoring import Scorer, choose_scorer
from qlora_dpo.reference.local import logps_by_completion, reference_score

BETWEEN_SHOWS = 0.05  # seconds
LEFT_ALONE = 15.0  # seconds without anybody who reads on, after which a visitor has left
SCORED_TOKENS = 8192

Ended = Literal["stop", "length", "time"]
Written = tuple["Answer", tuple[int, ...]]
"""An answer with its ids."""


@dataclass(frozen=True)
class Part:
    """A token of an answer as text, and how likely both models find it."""

    text: str
    before: float
    after: float

    @property
    def log_ratio(self) -> float:
        """Above 0: training made it likelier."""
        return self.after - self.before


@dataclass(frozen=True)
class Answer:
    """An answer as far as it is written."""

    text: str = ""
    tokens: int = 0
    ended: Ended | None = None
    """None while it is being written."""
    seconds: float = 0.0
    logp: float = 0.0
    """Of the whole answer under the model that wrote it."""
    reward: float = 0.0
    parts: tuple[Part, ...] = ()
    """Known when both answers are written."""


@dataclass(frozen=True)
class Asked:
    """How a prompt is to be answered."""

    prompt: str | Sequence[Message]
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


class _Left(Exception):
    """Nobody reads on, or the time is over."""


@dataclass
class _Writing:
    """What the thread that generates and the one that shows share."""

    pieces: queue.SimpleQueue[tuple[int, ...] | Completion | BaseException] = field(default_factory=queue.SimpleQueue)
    stopped: threading.Event = field(default_factory=threading.Event)
    read_at: float = field(default_factory=time.monotonic)


class Comparison:
    """One model in memory; one prompt at a time."""

    def __init__(self, model: Any, tokenizer: Any, *, longest_answer: int, beta: float = 0.1) -> None:
        self._model, self._tokenizer, self.longest_answer, self._beta = model.eval(), tokenizer, longest_answer, beta
        self._prompts = PairTokenizer(tokenizer, max_length=2 * LONGEST_PROMPT, max_prompt_length=LONGEST_PROMPT)
        self._lock = threading.Lock()
        self._scorer: Scorer | None = None

    def stream(self, asked: Asked) -> Iterator[tuple[Answer, Answer]]:
        """Both answers, again and again while they are written, at last with their log-probs.

        Whoever stops reading ends the writing, at the next token.
        """
        asked = replace(asked, max_new_tokens=min(asked.max_new_tokens, self.longest_answer))
        ids = self._prompts.render_prompt_ids(asked.prompt)
        before: Written = (Answer(), ())
        after: Written = (Answer(), ())
        for before in self._write(ids, asked, is_reference=True):
            yield before[0], after[0]
        for after in self._write(ids, asked, is_reference=False):
            yield before[0], after[0]
        yield self._scored(ids, before, after)

    def __call__(self, asked: Asked) -> tuple[Answer, Answer]:
        """Both answers when they are written."""
        *_, both = self.stream(asked)
        return both

    def _write(
        self, prompt_ids: Sequence[int], asked: Asked, *, is_reference: bool
    ) -> Iterator[tuple[Answer, tuple[int, ...]]]:
        """An answer with its ids, whenever there is more of it."""
        writing = _Writing()
        thread = threading.Thread(target=self._generate, args=(writing, prompt_ids, asked, is_reference), daemon=True)
        started = time.monotonic()
        thread.start()
        ids: tuple[int, ...] = ()
        try:
            while True:
                found = _newest(writing.pieces)
                if isinstance(found, BaseException):
                    raise found
                seconds = time.monotonic() - started
                if isinstance(found, Completion):
                    ended: Ended = found.finish_reason
                    yield Answer(found.text, len(found.ids), ended, seconds), found.ids
                    return
                if found is not None:
                    ids = found
                    yield Answer(self._text(ids), len(ids), None, seconds), ids
                elif not thread.is_alive() and writing.pieces.empty():  # it ran into the limit of time
                    yield Answer(self._text(ids), len(ids), "time", seconds), ids
                    return
                writing.read_at = time.monotonic()
                time.sleep(BETWEEN_SHOWS)
        finally:
            writing.stopped.set()
            thread.join()

    def _generate(self, writing: _Writing, prompt_ids: Sequence[int], asked: Asked, is_reference: bool) -> None:
        """Run in a thread of its own, because `generate` of transformers gives its caller nothing until it is done."""
        deadline = time.monotonic() + MAX_SECONDS

        def watch(ids: torch.Tensor) -> None:
            now = time.monotonic()
            if writing.stopped.is_set() or now - writing.read_at > LEFT_ALONE or now > deadline:
                raise _Left
            writing.pieces.put(tuple(ids[0].tolist()))

        try:
            with self._lock, reference_active(self._model) if is_reference else nullcontext():
                (found,) = complete(
                    self._model, self._tokenizer, [prompt_ids], [asked.seed], max_new_tokens=asked.max_new_tokens,
                    end_token_ids=[self._prompts.end_id], temperature=asked.temperature, watch=watch,
                )  # fmt: skip
            writing.pieces.put(found)
        except _Left:
            pass
        except BaseException as error:  # whoever reads raises it
            writing.pieces.put(error)

    def _text(self, ids: Sequence[int]) -> str:
        """What is written so far; a character whose bytes are not all there yet is left out."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip().rstrip("\N{REPLACEMENT CHARACTER}")

    def _scored(self, prompt_ids: Sequence[int], *written: tuple[Answer, tuple[int, ...]]) -> tuple[Answer, Answer]:
        """Both answers with their log-probs under both models."""
        before, after = (answer for answer, _ in written)
        before_ids, after_ids = (ids for _, ids in written)
        if not before_ids or not after_ids:
            return before, after
        pair = TokenizedPair(list(prompt_ids), list(before_ids), list(after_ids))
        with self._lock:
            scorer = self._scorer = self._scorer or choose_scorer(self._model, pair, self._model.device)

        def policy(batch: PackedBatch) -> torch.Tensor:
            with torch.no_grad():
                return scorer.per_token_logps(self._model, batch)

        with self._lock:
            under_policy, under_reference = (
                logps_by_completion(
                    score, [pair], kind=scorer.kind, device=self._model.device, max_tokens=SCORED_TOKENS
                )
                for score in (policy, reference_score(self._model, scorer))
            )
        own = under_reference, under_policy
        scored = [
            self._with_logps(answer, ids, own[place][place], under_reference[place], under_policy[place])
            for place, (answer, ids) in enumerate(written)
        ]
        return scored[0], scored[1]

    def _with_logps(self, answer: Answer, ids: Sequence[int], own: Any, reference: Any, policy: Any) -> Answer:
        values = zip(self._pieces(ids), reference.tolist(), policy.tolist(), strict=True)
        parts = tuple(Part(text, before, after) for text, before, after in values)
        reward = self._beta * float(sum(part.log_ratio for part in parts))
        return replace(answer, logp=float(sum(own.tolist())), reward=reward, parts=parts)

    def _pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds; the first token of a character of several gets it whole."""
        pieces, shown = [], ""
        for end in range(1, len(ids) + 1):
            text: str = self._tokenizer.decode(list(ids[:end]), skip_special_tokens=False)
            whole = text.rstrip("\N{REPLACEMENT CHARACTER}") if end < len(ids) else text
            pieces.append(whole[len(shown) :] if whole.startswith(shown) else "")
            shown = whole if whole.startswith(shown) else shown
        return pieces


def _newest(pieces: queue.SimpleQueue[Any]) -> Any:
    """The last that came; None where nothing did."""
    found = None
    while not pieces.empty():
        found = pieces.get()
        if not isinstance(found, tuple):
            break
    return found
