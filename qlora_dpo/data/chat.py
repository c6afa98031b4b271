"""Chats as text: what the tokenizer's chat template writes, with text in messages kept apart from control tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_dpo.data.control_tokens import ControlTokenEncoder, uses_bos
from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What the chat template writes around an answer, and the token that ends the turn.

    `end` is that token as the template writes it; None where it writes none and eos is added.
    """

    opening: str
    closing: str
    end_id: int
    end: str | None


class Chat:
    """Renders conversations for one tokenizer; the rendered texts are for `encode`.

    Raises:
        UsageError: when the tokenizer lacks a chat template that can be used, or an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.encoder = ControlTokenEncoder(tokenizer)
        self._bos_id: int | None = tokenizer.bos_token_id
        self._adds_bos = uses_bos(tokenizer)
        self.form = self._find_answer_form()

    def render_prompts(self, prompts: Sequence[Prompt]) -> list[str | Exception]:
        """Render prompts up to where the answer begins; the exception of the template where it refuses one."""
        conversations = [self.protected(prompt) for prompt in prompts]
        try:
            return [self.encoder.reveal(text) for text in self.render(conversations)]
        except Exception:  # a template is a program and raises what it likes; one conversation spoils the batch
            return [self._render_one(conversation) for conversation in conversations]

    def render(self, conversations: list[list[Message]], generation_prompt: bool = True) -> list[str]:
        """What the template writes; `encoder.reveal` makes it ready for the encoder."""
        render: Any = self.tokenizer.apply_chat_template
        return list(render(conversations, tokenize=False, add_generation_prompt=generation_prompt))

    def protected(self, prompt: Prompt) -> list[Message]:
        """The messages with control text in them replaced by markers."""
        protect = self.encoder.protect
        if isinstance(prompt, str):
            return [{"role": "user", "content": protect(prompt)}]
        return [{"role": message["role"], "content": protect(message["content"])} for message in prompt]

    def with_bos(self, ids: list[int]) -> list[int]:
        """Start with exactly one BOS if the template or the tokenizer wants one."""
        if self._bos_id is None:
            return ids
        written = next((i for i, id_ in enumerate(ids) if id_ != self._bos_id), len(ids))
        return [self._bos_id, *ids[written:]] if written or self._adds_bos else ids

    def _render_one(self, conversation: list[Message]) -> str | Exception:
        try:
            return self.encoder.reveal(self.render([conversation])[0])
        except Exception as error:
            return error

    def _find_answer_form(self) -> AnswerForm:
        """Learn from a rendered conversation what the template writes around an answer."""
        answer = f"answer{secrets.token_hex(8)}"
        question: Message = {"role": "user", "content": "question"}
        try:
            (prompt,) = self.render([[question]])
            conversation: list[Message] = [question, {"role": "assistant", "content": answer}]
            (whole,) = self.render([conversation], generation_prompt=False)
        except Exception as error:
            raise UsageError(
                f"the chat template cannot render one question and its answer: {error}; "
                "choose another with --prompt_template."
            ) from error
        before, _, after = whole.partition(answer)
        # Where the prompt is no prefix (it opens a thought), the answer follows the prompt directly.
        opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
        end = self.encoder.pattern.search(after)
        if end:
            return AnswerForm(
                self.encoder.reveal(opening),
                after[: end.start()],
                int(self.tokenizer.convert_tokens_to_ids(end[0])),  # type: ignore[arg-type]
                end[0],
            )
        if self.tokenizer.eos_token_id is None:
            raise UsageError(
                "no token ends an answer: the chat template writes none and the tokenizer has no eos_token; "
                "set eos_token in tokenizer_config.json."
            )
        return AnswerForm(self.encoder.reveal(opening), "", int(self.tokenizer.eos_token_id), None)
