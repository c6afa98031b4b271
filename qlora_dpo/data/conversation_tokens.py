"""Conversations to token ids, with the spans of them that are learned: the assistant's turns.

The ids are those of the whole conversation as the chat template renders it. A turn of the assistant is what the
template writes behind the messages before it with its generation prompt (`completions.py`). A turn that the template
writes otherwise once messages follow it (it drops thoughts, or adds text) is context there, not learned: the model
would never write it so.

A conversation that is too long loses its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from qlora_dpo.data.chat import Chat
from qlora_dpo.data.chat_context import ChatContext
from qlora_dpo.data.completions import Completion
from qlora_dpo.data.conversations import Conversation
from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.data.tokenization import refused_by_template
from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING_WITHIN_MAX_LENGTH = "no answer begins within --max_length"


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """A conversation as token ids, up to the last one that is learned."""

    ids: list[int]
    borders: list[int]
    """Start and end of each span that is learned, one after the other; the first is above 0."""
    category: str | None = None
    origin: str = ""

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each span that is learned."""
        return list(zip(self.borders[::2], self.borders[1::2], strict=True))

    @property
    def prompt_ids(self) -> list[int]:
        """What stands before the first token that is learned."""
        return self.ids[: self.borders[0]]


@dataclass(slots=True)
class ConversationCounts:
    """What the length limit and the chat template did, in conversations and turns."""

    truncated_conversations: int = 0
    context_turns: int = 0


@dataclass(frozen=True, slots=True)
class _Cut:
    """A rendered conversation in pieces: what is given and what is learned in turns, beginning with what is given."""

    pieces: list[str]
    ends_with_eos: bool
    """No end token was rendered: eos is added to the last piece."""
    context_turns: int
    """Answers that are given."""

    @property
    def whole(self) -> str:
        return "".join(self.pieces)


class ConversationTokenizer:
    """Tokenizes conversations in batches and counts what it cut.

    Raises:
        UsageError: when the limit leaves no room, or the tokenizer lacks a chat template or an end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 1024) -> None:
        if max_length < 2:
            raise UsageError(f"max_length {max_length} leaves no room for an answer: it must be at least 2.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.counts = ConversationCounts()
        self._chat = Chat(tokenizer)

    @property
    def limits(self) -> tuple[int, ...]:
        """The numbers that decide what is cut."""
        return (self.max_length,)

    def tokenize(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation | RefusedRow]:
        """Tokenize a batch of conversations; the result stands in the same order."""
        cuts = [self._try_cut(conversation) for conversation in conversations]
        texts = [text for cut in cuts if isinstance(cut, _Cut) for text in (cut.whole, *cut.pieces)]
        encoded = iter(self._chat.encoder.encode(texts))
        results: list[TokenizedConversation | RefusedRow] = []
        for conversation, cut in zip(conversations, cuts, strict=True):
            if isinstance(cut, RefusedRow):
                results.append(cut)
                continue
            whole = next(encoded)
            ids, ends = self._with_ends(cut, whole, [next(encoded) for _ in cut.pieces])
            results.append(self._assemble(conversation, cut, ids, ends))
        return results

    def _try_cut(self, conversation: Conversation) -> _Cut | RefusedRow:
        """Render the conversation and find the assistant's turns in it."""
        context = ChatContext(conversation.tools, conversation.chat_template_kwargs)
        messages = [self._chat.protected_message(message) for message in conversation.messages]
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        before, contexts = [messages[:number] for number in turns], [context] * len(turns)
        prompts = self._chat.render_prompts(before, contexts)
        answers = [conversation.messages[number] for number in turns]
        completions = self._chat.render_answers(before, prompts, answers, contexts)
        prompt, last = prompts[-1], completions[-1]
        for part in (prompt, last):
            if isinstance(part, Exception):
                return refused_by_template(conversation.origin, "messages", part, messages)
        assert isinstance(prompt, str) and isinstance(last, Completion)
        whole = prompt + last.text
        borders = [0]
        for earlier, completion in zip(prompts[:-1], completions[:-1], strict=True):
            if isinstance(earlier, str) and isinstance(completion, Completion):
                text = earlier + completion.text
                borders += [len(earlier), len(text)] if whole.startswith(text) else []
        borders += [len(prompt), len(whole)]
        pieces = [self._chat.encoder.reveal(whole[start:end]) for start, end in pairwise(borders)]
        return _Cut(pieces, not last.has_end, len(turns) - len(borders) // 2)

    def _with_ends(self, cut: _Cut, whole: list[int], pieces: list[list[int]]) -> tuple[list[int], list[int]]:
        """The ids of a conversation and where each piece ends in them.

        Where a token would reach across the begin or end of a turn, the pieces are encoded apart, as they are when the
        model generates.
        """
        joined = [id_ for piece in pieces for id_ in piece]
        if joined == whole:
            return whole, list(accumulate(len(piece) for piece in pieces))
        # Some tokenizers begin every text in another way (a space before it): then only what begins with the
        # conversation's own beginning can be compared.
        beginnings = self._chat.encoder.encode(list(accumulate(cut.pieces)))
        if all(whole[: len(beginning)] == beginning for beginning in beginnings):
            return whole, [len(beginning) for beginning in beginnings]
        return joined, list(accumulate(len(piece) for piece in pieces))

    def _assemble(
        self, conversation: Conversation, cut: _Cut, encoded: list[int], ends: list[int]
    ) -> TokenizedConversation | RefusedRow:
        ids = self._chat.with_bos(encoded)
        shift = len(ids) - len(encoded)
        borders = [end + shift for end in ends]
        if cut.ends_with_eos:
            ids = [*ids, self._chat.form.end_id]
            borders[-1] += 1
        if borders[0] < 1:
            return RefusedRow(conversation.origin, "messages", "nothing stands before the answer to predict it from")
        spans = [(start, min(end, self.max_length)) for start, end in zip(borders[::2], borders[1::2], strict=True)]
        left = [border for span in spans if span[0] < self.max_length for border in span]
        if not left:
            reason = f"{NOTHING_WITHIN_MAX_LENGTH} ({borders[0]} tokens stand before the first)"
            return RefusedRow(conversation.origin, "messages", reason)
        self.counts.truncated_conversations += len(ids) > self.max_length
        self.counts.context_turns += cut.context_turns
        return TokenizedConversation(ids[: left[-1]], left, conversation.category, conversation.origin)
