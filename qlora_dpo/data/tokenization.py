"""Pairs of text to pairs of token ids.

The prompt is rendered by the tokenizer's chat template with its generation prompt, and tokenized apart from
the answers, so the model is trained on the ids that it sees when it generates. An answer ends with the
token that ends a turn. A prompt that is too long keeps its end (and its BOS); an answer that is too long
keeps its start, and has no end token then.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_dpo.data.control_tokens import ControlTokenEncoder, uses_bos
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow
from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EQUAL_AFTER_TRUNCATION = "the same answer as chosen once both are truncated"

Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A pair as token ids: the prompt with its BOS, each answer with its end token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    category: str | None = None
    confidence: float = 1.0
    origin: str = ""


@dataclass(slots=True)
class TruncationCounts:
    """What the length limits did to the pairs, in prompts, answers and pairs."""

    truncated_prompts: int = 0
    truncated_completions: int = 0
    dropped_equal_after_truncation: int = 0


@dataclass(frozen=True, slots=True)
class _AnswerForm:
    """What the chat template writes around an answer, and the token that ends the turn."""

    opening: str
    closing: str
    end_id: int


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
        self._encoder = ControlTokenEncoder(tokenizer)
        self._bos_id: int | None = tokenizer.bos_token_id
        self._adds_bos = uses_bos(tokenizer)
        self._form = self._find_answer_form()

    @property
    def end_id(self) -> int:
        """The token that ends every answer that was not truncated."""
        return self._form.end_id

    def tokenize(self, pairs: Sequence[PreferencePair]) -> list[TokenizedPair | RefusedRow]:
        """Tokenize a batch of pairs; the result stands in the same order."""
        rendered = self._render_all([pair.prompt for pair in pairs])
        usable = [(pair, text) for pair, text in zip(pairs, rendered, strict=True) if isinstance(text, str)]
        texts = [text for _, text in usable]
        texts += [self._completion_text(pair.chosen) for pair, _ in usable]
        texts += [self._completion_text(pair.rejected) for pair, _ in usable]
        ids = self._encoder.encode(texts)
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
        (rendered,) = self._render_all([prompt])
        if isinstance(rendered, Exception):
            raise UsageError(f"the chat template refuses this prompt: {rendered}; change its messages.") from rendered
        return self._fit_prompt(self._with_bos(self._encoder.encode([rendered])[0]))

    def _assemble(
        self, pair: PreferencePair, prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int]
    ) -> TokenizedPair | RefusedRow:
        whole_prompt = self._with_bos(prompt_ids)
        prompt = self._fit_prompt(whole_prompt)
        chosen, rejected = (self._fit_completion(ids, len(prompt)) for ids in (chosen_ids, rejected_ids))
        if chosen_ids == rejected_ids:
            return RefusedRow(pair.origin, "rejected", "the same token ids as chosen")
        if chosen == rejected:
            self.counts.dropped_equal_after_truncation += 1
            return RefusedRow(pair.origin, "rejected", EQUAL_AFTER_TRUNCATION)
        self.counts.truncated_prompts += len(prompt) < len(whole_prompt)
        # A whole answer is longer than its text by the end token.
        self.counts.truncated_completions += len(chosen) <= len(chosen_ids)
        self.counts.truncated_completions += len(rejected) <= len(rejected_ids)
        return TokenizedPair(prompt, chosen, rejected, pair.category, pair.confidence, pair.origin)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Start with exactly one BOS if the template or the tokenizer wants one."""
        if self._bos_id is None:
            return ids
        written = next((i for i, id_ in enumerate(ids) if id_ != self._bos_id), len(ids))
        return [self._bos_id, *ids[written:]] if written or self._adds_bos else ids

    def _fit_prompt(self, ids: list[int]) -> list[int]:
        excess = len(ids) - self.max_prompt_length
        if excess <= 0:
            return ids
        kept = 1 if ids[0] == self._bos_id else 0
        return ids[:kept] + ids[kept + excess :]

    def _fit_completion(self, ids: list[int], prompt_length: int) -> list[int]:
        room = self.max_length - prompt_length
        return [*ids, self._form.end_id] if len(ids) < room else ids[:room]

    def _completion_text(self, answer: str) -> str:
        return self._form.opening + answer + self._form.closing

    def _render_all(self, prompts: Sequence[Prompt]) -> list[str | Exception]:
        """Render prompts to text for the encoder; the exception of the template where it refuses one."""
        conversations = [self._protected(prompt) for prompt in prompts]
        try:
            return [self._encoder.reveal(text) for text in self._render(conversations)]
        except Exception:  # a template is a program and raises what it likes; one conversation spoils the batch
            return [self._render_one(conversation) for conversation in conversations]

    def _render_one(self, conversation: list[Message]) -> str | Exception:
        try:
            return self._encoder.reveal(self._render([conversation])[0])
        except Exception as error:
            return error

    def _render(self, conversations: list[list[Message]], generation_prompt: bool = True) -> list[str]:
        render: Any = self.tokenizer.apply_chat_template
        return list(render(conversations, tokenize=False, add_generation_prompt=generation_prompt))

    def _protected(self, prompt: Prompt) -> list[Message]:
        protect = self._encoder.protect
        if isinstance(prompt, str):
            return [{"role": "user", "content": protect(prompt)}]
        return [{"role": message["role"], "content": protect(message["content"])} for message in prompt]

    def _find_answer_form(self) -> _AnswerForm:
        """Learn from a rendered conversation what the template writes around an answer."""
        answer = f"answer{secrets.token_hex(8)}"
        question: Message = {"role": "user", "content": "question"}
        try:
            (prompt,) = self._render([[question]])
            conversation: list[Message] = [question, {"role": "assistant", "content": answer}]
            (whole,) = self._render([conversation], generation_prompt=False)
        except Exception as error:
            raise UsageError(
                f"the chat template cannot render one question and its answer: {error}; "
                "choose another with --prompt_template."
            ) from error
        before, _, after = whole.partition(answer)
        # Where the prompt is no prefix (it opens a thought), the answer follows the prompt directly.
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        end = self._encoder.pattern.search(after)
        if end:
            return _AnswerForm(
                self._encoder.reveal(opening),
                after[: end.start()],
                int(self.tokenizer.convert_tokens_to_ids(end[0])),  # type: ignore[arg-type]
            )
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                "no token ends an answer: the chat template writes none and the tokenizer has no eos_token; "
                "set eos_token in tokenizer_config.json."
            )
        return _AnswerForm(self._encoder.reveal(opening), "", int(self.tokenizer.eos_token_id))


def _check_limits(max_length: int, max_prompt_length: int) -> None:
    if max_prompt_length < 2 or max_length <= max_prompt_length:
        raise UsageError(
            f"max_length {max_length} and max_prompt_length {max_prompt_length} leave no room: the first "
            "counts prompt and answer together and must be larger than the second, which must be at least 2."
        )
