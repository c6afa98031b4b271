"""Pairs of text to pairs of token ids.

The prompt is rendered by the tokenizer's chat template with its generation prompt and has the ids that the model sees
when it generates. An answer is what the template's rendering of the whole conversation writes behind it, up to the
token that ends the turn (`completions.py`). A prompt that is too long keeps its end (and its BOS); an answer that is
too long keeps its start, and has no end token then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_dpo.data.chat import FOLD, Chat, Prompt
from qlora_dpo.data.chat_context import NO_CONTEXT, ChatContext
from qlora_dpo.data.completions import OTHERWISE, Completion
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow, RowError
from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EQUAL_AFTER_TRUNCATION = "the same answer as chosen once both are truncated"


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as token ids: the prompt with its BOS, each answer with its end token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    category: str | None = None
    confidence: float = 1.0
    origin: str = ""
    reference_chosen_logp: float | None = None
    """Log-prob of the whole answer under some reference, as the row brought it along."""
    reference_rejected_logp: float | None = None


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A pair as the chat template writes it, in texts for the encoder."""

    prompt: str
    chosen: Completion
    rejected: Completion


@dataclass(slots=True)
class TruncationCounts:
    """What the length limits did to the pairs, in prompts, answers and pairs."""

    truncated_prompts: int = 0
    truncated_completions: int = 0
    dropped_equal_after_truncation: int = 0
    reference_logps: int = 0
    """Pairs that keep the log-probs that their rows brought along."""
    dropped_reference_logps: int = 0
    """Pairs that lose them: they are of a longer text."""


class PairTokenizer:
    """Tokenizes pairs in batches and counts what it cut; `max_length` tokens hold prompt and answer together.

    Raises:
        UsageError: when the limits leave no room, or the tokenizer lacks a chat template or an end token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int = 1024, max_prompt_length: int = 512
    ) -> None:
        _check_limits(max_length, max_prompt_length)
        self.tokenizer = tokenizer
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.counts = TruncationCounts()
        self._chat = Chat(tokenizer)

    @property
    def limits(self) -> tuple[int, ...]:
        """The numbers that decide what is cut."""
        return self.max_length, self.max_prompt_length

    @property
    def end_id(self) -> int:
        """The token that ends every answer that was not truncated."""
        return self._chat.form.end_id

    def tokenize(self, pairs: Sequence[PreferencePair]) -> list[TokenizedPair | RefusedRow]:
        """Tokenize a batch of pairs; the result stands in the same order."""
        rows = self.render(pairs)
        usable = [row for row in rows if isinstance(row, RenderedPair)]
        encoder, prompts = self._chat.encoder, [row.prompt for row in usable]
        answers = [row.chosen.text for row in usable] + [row.rejected.text for row in usable]
        ids = encoder.encode_behind([*prompts, *prompts], answers)
        count = len(usable)
        encoded = zip(encoder.encode(prompts), ids[:count], ids[count:], strict=True)
        return [
            self._assemble(pair, row, *next(encoded)) if isinstance(row, RenderedPair) else row
            for pair, row in zip(pairs, rows, strict=True)
        ]

    def render(self, pairs: Sequence[PreferencePair]) -> list[RenderedPair | RefusedRow]:
        """What the chat template writes for each pair, as texts for the encoder."""
        chat = self._chat
        contexts = [ChatContext(pair.tools, pair.chat_template_kwargs) for pair in pairs]
        asked = [chat.protected(pair.prompt) for pair in pairs]
        prompts = chat.render_prompts(asked, contexts)
        chosen = chat.render_answers(asked, prompts, [pair.chosen_message for pair in pairs], contexts)
        rejected = chat.render_answers(asked, prompts, [pair.rejected_message for pair in pairs], contexts)
        return [
            _rendered(pair, *texts, reveal=chat.encoder.reveal)
            for pair, texts in zip(pairs, zip(prompts, chosen, rejected, strict=True), strict=True)
        ]

    def readable(self, text: str) -> str:
        """A rendered text with the names of its control tokens."""
        return self._chat.encoder.readable(text)

    def render_prompt_ids(self, prompt: Prompt, context: ChatContext = NO_CONTEXT) -> list[int]:
        """Return the ids of a prompt as training saw it, to generate from.

        Raises:
            UsageError: when the chat template refuses the conversation.
        """
        return self._fit_prompt(self._chat.prompt_ids(prompt, context))

    def _assemble(
        self,
        pair: PreferencePair,
        rendered: RenderedPair,
        prompt_ids: list[int],
        chosen_ids: list[int],
        rejected_ids: list[int],
    ) -> TokenizedPair | RefusedRow:
        chosen_ids += [] if rendered.chosen.has_end else [self.end_id]
        rejected_ids += [] if rendered.rejected.has_end else [self.end_id]
        whole_prompt = self._chat.with_bos(prompt_ids)
        prompt = self._fit_prompt(whole_prompt)
        chosen, rejected = (self._fit_completion(ids, len(prompt)) for ids in (chosen_ids, rejected_ids))
        if chosen_ids == rejected_ids:
            return RefusedRow(pair.origin, "rejected", "the same token ids as chosen")
        if chosen == rejected:
            self.counts.dropped_equal_after_truncation += 1
            return RefusedRow(pair.origin, "rejected", EQUAL_AFTER_TRUNCATION)
        self.counts.truncated_prompts += len(prompt) < len(whole_prompt)
        truncated = (len(chosen) < len(chosen_ids)) + (len(rejected) < len(rejected_ids))
        self.counts.truncated_completions += truncated
        is_whole = not truncated and len(prompt) == len(whole_prompt)
        logps = self._reference_logps(pair, is_whole)
        return TokenizedPair(prompt, chosen, rejected, pair.category, pair.confidence, pair.origin, *logps)

    def _reference_logps(self, pair: PreferencePair, is_whole: bool) -> tuple[float | None, float | None]:
        """The log-probs that the row brings along, unless they are of more than is left of the pair."""
        if pair.reference_logps is None:
            return None, None
        self.counts.reference_logps += is_whole
        self.counts.dropped_reference_logps += not is_whole
        return pair.reference_logps if is_whole else (None, None)

    def _fit_prompt(self, ids: list[int]) -> list[int]:
        excess = len(ids) - self.max_prompt_length
        if excess <= 0:
            return ids
        kept = 1 if ids[0] == self.tokenizer.bos_token_id else 0
        return ids[:kept] + ids[kept + excess :]

    def _fit_completion(self, ids: list[int], prompt_length: int) -> list[int]:
        return ids[: self.max_length - prompt_length]


def refused_by_template(origin: str, field: str, error: Exception, messages: Sequence[Message]) -> RefusedRow:
    """A row with these messages that the chat template cannot write."""
    is_of_system = not isinstance(error, RowError) or "system message" in error.reason or OTHERWISE in error.reason
    hint = FOLD if messages[0]["role"] == "system" and is_of_system else ""
    if isinstance(error, RowError):
        return RefusedRow(origin, field if error.field == "answer" else error.field, error.reason + hint)
    return RefusedRow(origin, field, f"the chat template refuses it{hint} ({error})")


def _rendered(
    pair: PreferencePair,
    prompt: str | Exception,
    chosen: Completion | Exception,
    rejected: Completion | Exception,
    reveal: Callable[[str], str],
) -> RenderedPair | RefusedRow:
    for field, part in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if isinstance(part, Exception):
            return refused_by_template(pair.origin, field, part, pair.messages)
    assert isinstance(prompt, str) and isinstance(chosen, Completion) and isinstance(rejected, Completion)
    chosen, rejected = (replace(part, text=reveal(part.text)) for part in (chosen, rejected))
    return RenderedPair(reveal(prompt), chosen, rejected)


def _check_limits(max_length: int, max_prompt_length: int) -> None:
    if max_prompt_length < 2 or max_length <= max_prompt_length:
        raise UsageError(
            f"max_length {max_length} and max_prompt_length {max_prompt_length} leave no room: the first "
            "counts prompt and answer together and must be larger than the second, which must be at least 2."
        )
