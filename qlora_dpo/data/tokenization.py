"""Pairs of text to pairs of token ids.

The prompt is rendered by the tokenizer's chat template with its generation prompt, and tokenized apart from
the answers, so the model is trained on the ids that it sees when it generates. An answer ends with the
token that ends a turn. A prompt that is too long keeps its end (and its BOS); an answer that is too long
keeps its start, and has no end token then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_dpo.data.chat import Chat, Prompt
from qlora_dpo.data.preferences import PreferencePair, RefusedRow
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
        rendered = self._chat.render_prompts([pair.prompt for pair in pairs])
        usable = [(pair, text) for pair, text in zip(pairs, rendered, strict=True) if isinstance(text, str)]
        texts = [text for _, text in usable]
        texts += [self._completion_text(pair.chosen) for pair, _ in usable]
        texts += [self._completion_text(pair.rejected) for pair, _ in usable]
        ids = self._chat.encoder.encode(texts)
        count = len(usable)
        encoded = zip(ids[:count], ids[count : 2 * count], ids[2 * count :], strict=True)
        return [
            self._assemble(pair, *next(encoded))
            if isinstance(text, str)
            else RefusedRow(pair.origin, "prompt", f"the chat template refuses it ({text})")
            for pair, text in zip(pairs, rendered, strict=True)
        ]

    def render_prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt as training saw it, to generate from.

        Raises:
            UsageError: when the chat template refuses the conversation.
        """
        (rendered,) = self._chat.render_prompts([prompt])
        if isinstance(rendered, Exception):
            raise UsageError(f"the chat template refuses this prompt: {rendered}; change its messages.") from rendered
        return self._fit_prompt(self._chat.with_bos(self._chat.encoder.encode([rendered])[0]))

    def _assemble(
        self, pair: PreferencePair, prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]
    ) -> TokenizedPair | RefusedRow:
        whole_prompt = self._chat.with_bos(prompt_ids)
        prompt = self._fit_prompt(whole_prompt)
        chosen, rejected = (self._fit_completion(ids, len(prompt)) for ids in (chosen_ids, rejected_ids))
        if chosen_ids == rejected_ids:
            return RefusedRow(pair.origin, "rejected", "the same token ids as chosen")
        if chosen == rejected:
            self.counts.dropped_equal_after_truncation += 1
            return RefusedRow(pair.origin, "rejected", EQUAL_AFTER_TRUNCATION)
        self.counts.truncated_prompts += len(prompt) < len(whole_prompt)
        # A whole answer is longer than its text by the end token.
        truncated = (len(chosen) <= len(chosen_ids)) + (len(rejected) <= len(rejected_ids))
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
        room = self.max_length - prompt_length
        return [*ids, self._chat.form.end_id] if len(ids) < room else ids[:room]

    def _completion_text(self, answer: str) -> str:
        form = self._chat.form
        return form.opening + answer + form.closing


def _check_limits(max_length: int, max_prompt_length: int) -> None:
    if max_prompt_length < 2 or max_length <= max_prompt_length:
        raise UsageError(
            f"max_length {max_length} and max_prompt_length {max_prompt_length} leave no room: the first "
            "counts prompt and answer together and must be larger than the second, which must be at least 2."
        )
