"""Conversations to token ids, with the spans of them that are learned: the assistant's turns.

The ids are those of the whole conversation as the chat template renders it. A turn of the assistant begins where the
rendering of the messages before it, with its generation prompt, ends; it ends with its end token. A turn that the
template writes otherwise once messages follow it (it drops thoughts, or adds text) is context there, not learned: the
model would never write it so. Where the generation prompt itself is not what the template writes before the last
answer (it opens a thought), only that answer is learned, directly after the generation prompt, as in pairs.

A conversation that is too long loses its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from qlora_dpo.data.chat import Chat
from qlora_dpo.data.conversations import Conversation
from qlora_dpo.data.preferences import Message, RefusedRow, RowError
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
        try:
            return self._cut(list(conversation.messages))
        except RowError as error:
            return RefusedRow(conversation.origin, error.field, error.reason)
        except Exception as error:  # a template is a program and raises what it likes
            return RefusedRow(conversation.origin, "messages", f"the chat template refuses it ({error})")

    def _cut(self, messages: list[Message]) -> _Cut:
        """Render the conversation and find the assistant's turns in it.

        Raises:
            RowError: when the template does not write the last answer as it is.
        """
        protected = self._chat.protected(messages)
        turns = [number for number, message in enumerate(protected) if message["role"] == "assistant"]
        prompts = self._chat.render([protected[:number] for number in turns])
        ended = self._chat.render([protected[: number + 1] for number in turns], generation_prompt=False)
        whole, answer = ended[-1], protected[-1]["content"]
        last = self._turn(prompts[-1], whole, answer)
        if last is None:
            return self._last_answer_alone(prompts[-1], whole, answer, len(turns) - 1)
        spans = []
        for number, prompt, text in zip(turns[:-1], prompts, ended, strict=False):
            span = self._turn(prompt, text, protected[number]["content"])
            if span is not None and whole.startswith(text[: span[1]]):
                spans.append(span)
        spans.append(last)
        borders = [0, *(border for span in spans for border in span)]
        pieces = [self._chat.encoder.reveal(whole[start:end]) for start, end in pairwise(borders)]
        return _Cut(pieces, self._chat.form.end is None, len(turns) - len(spans))

    def _turn(self, prompt: str, text: str, answer: str) -> tuple[int, int] | None:
        """Where the answer that ends a rendered text begins and ends, with its end token; None where it does not
        follow its prompt, or is not all there."""
        if not text.startswith(prompt):
            return None
        written, end = text[len(prompt) :], self._chat.form.end
        if end is None:
            answer = answer if answer in written else answer.strip()
            place = written.rfind(answer)
            return (len(prompt), len(prompt) + place + len(answer)) if place >= 0 else None
        place = written.rfind(end)
        if place < 0 or _squeezed(answer) not in _squeezed(written[:place]):
            return None
        return len(prompt), len(prompt) + place + len(end)

    def _last_answer_alone(self, prompt: str, whole: str, answer: str, context_turns: int) -> _Cut:
        if _squeezed(answer) not in _squeezed(whole):
            raise RowError("messages", "the chat template drops or changes a part of the last answer")
        reveal, form = self._chat.encoder.reveal, self._chat.form
        completion = form.opening + reveal(answer + form.closing + (form.end or ""))
        return _Cut([reveal(prompt), completion], form.end is None, context_turns)

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


def _squeezed(text: str) -> str:
    """A text without its white space, which templates trim and add."""
    return "".join(text.split())
