"""Rules about the token ids of a row: BOS, the end token, unknown tokens, and the way from text to ids and back."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.chat import Chat
from qlora_dpo.data.chat_context import NO_CONTEXT, ChatContext
from qlora_dpo.data.control_tokens import control_tokens, uses_bos
from qlora_dpo.data.linting.findings import Rule
from qlora_dpo.data.preferences import Message, PreferencePair
from qlora_dpo.data.ragged import Ragged
from qlora_dpo.data.template_clock import reads_clock
from qlora_dpo.data.tokenization import PairTokenizer, RenderedPair, TokenizedPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IdBatch = tuple[Ragged, Ragged, Ragged]

Found = Iterator[tuple[int, str]]  # row, detail


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What must hold for the ids of one tokenizer with its chat template."""

    tokenizer: PairTokenizer
    bos_id: int | None
    starts_with_bos: bool
    one_bos: bool
    """False for templates that write a BOS before later turns too (LLaMA-2's)."""
    end_id: int
    unknown_id: int | None
    control_texts: tuple[str, ...]
    reads_clock: bool = False
    """The chat template writes today's date."""


def facts_of(tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int) -> TokenFacts:
    """Look at a tokenizer and at what its template writes. Raises: UsageError as `PairTokenizer`."""
    pair_tokenizer = PairTokenizer(tokenizer, max_length, max_prompt_length)
    bos_id: int | None = tokenizer.bos_token_id
    controls = control_tokens(tokenizer)
    unknown_id: int | None = tokenizer.unk_token_id
    end_id = pair_tokenizer.end_id
    written = _bos_of_template(tokenizer, bos_id)
    return TokenFacts(
        pair_tokenizer,
        bos_id,
        starts_with_bos=bos_id is not None and (uses_bos(tokenizer) or any(written)),
        one_bos=written in ([0, 0], [1, 1]),
        end_id=end_id,
        unknown_id=unknown_id if unknown_id in controls and unknown_id not in (bos_id, end_id) else None,
        control_texts=tuple(token.content for token in controls.values()),
        reads_clock=reads_clock(tokenizer),
    )


def _bos_of_template(tokenizer: PreTrainedTokenizerBase, bos_id: int | None) -> list[int]:
    """How often the template writes BOS in a prompt of one turn and in one of three; [] where that cannot be told."""
    if bos_id is None:
        return []
    chat = Chat(tokenizer)
    turns: list[Message] = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    texts = [text for text in chat.render_all([turns[:1], turns], [NO_CONTEXT] * 2) if isinstance(text, str)]
    return (
        [ids.count(bos_id) for ids in chat.encoder.encode([chat.encoder.reveal(text) for text in texts])]
        if len(texts) == 2
        else []
    )


def _bos(batch: IdBatch, facts: TokenFacts) -> Found:
    if facts.bos_id is None:
        return
    prompt = batch[0]
    counts = prompt.count(facts.bos_id)
    if facts.starts_with_bos:
        yield from _rows(prompt.firsts() != facts.bos_id, "the prompt does not begin with BOS")
    if facts.one_bos:
        for row in np.flatnonzero(counts > 1).tolist():
            yield row, f"BOS is {counts[row]} times in the prompt"
    if facts.bos_id != facts.end_id:
        for field, answers in zip(("chosen", "rejected"), batch[1:], strict=True):
            yield from _rows(answers.count(facts.bos_id) > 0, f"BOS is within {field}")


def _end_token(batch: IdBatch, facts: TokenFacts) -> Found:
    room = facts.tokenizer.max_length - batch[0].lengths()
    for field, answers in zip(("chosen", "rejected"), batch[1:], strict=True):
        ended = answers.lasts() == facts.end_id
        yield from _rows(~ended & (answers.lengths() < room), f"{field} was not cut and has no end token")
        yield from _rows(answers.count(facts.end_id) > ended, f"the end token is within {field}")


def _unknown_token(batch: IdBatch, facts: TokenFacts) -> Found:
    if facts.unknown_id is None:
        return
    for field, ids in zip(("prompt", "chosen", "rejected"), batch, strict=True):
        counts = ids.count(facts.unknown_id)
        for row in np.flatnonzero(counts).tolist():
            yield row, f"{counts[row]} tokens of {field} stand for characters that the tokenizer does not know"


def _rows(wrong: NDArray[np.bool_], detail: str) -> Found:
    return ((row, detail) for row in np.flatnonzero(wrong).tolist())


def _boundary(texts: Sequence[PreferencePair], pairs: Sequence[TokenizedPair], facts: TokenFacts) -> Found:
    anew = facts.tokenizer.tokenize(texts)
    for row, (text, pair, other) in enumerate(zip(texts, pairs, anew, strict=True)):
        context = ChatContext(text.tools, text.chat_template_kwargs)
        if pair.prompt_ids != facts.tokenizer.render_prompt_ids(text.prompt, context):
            yield row, "the prompt's ids are not those that the model is given to answer it"
        elif not isinstance(other, TokenizedPair) or (pair.chosen_ids, pair.rejected_ids) != (
            other.chosen_ids,
            other.rejected_ids,
        ):
            yield row, "the answers' ids are not those of its text"


def _round_trip(texts: Sequence[PreferencePair], pairs: Sequence[TokenizedPair], facts: TokenFacts) -> Found:
    tokenizer: Any = facts.tokenizer.tokenizer
    backend = tokenizer.backend_tokenizer
    rendered = facts.tokenizer.render(texts)
    for row, (text, pair) in enumerate(zip(rendered, pairs, strict=True)):
        if not isinstance(text, RenderedPair):
            continue  # what the rule `boundary` finds
        for field, answer, ids in (
            ("chosen", text.chosen, pair.chosen_ids),
            ("rejected", text.rejected, pair.rejected_ids),
        ):
            if ids[-1:] != [facts.end_id]:
                continue  # cut, maybe in the middle of a character
            written = facts.tokenizer.readable(answer.text)
            back = backend.decode(ids if answer.has_end else ids[:-1], skip_special_tokens=False)
            if _plain(written, backend) != _plain(back, backend):
                yield row, f"{field} becomes another text: {_difference(written, back)}"
                break


def _plain(text: str, backend: Any) -> str:
    """The text without what tokenizers may change on purpose: white space at the borders, composed characters."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text.strip())
    return unicodedata.normalize("NFKC", text).replace("▁", " ").strip()


def _difference(before: str, after: str) -> str:
    before, after = before.strip(), after.strip()
    shorter = min(len(before), len(after))
    start = next((place for place in range(shorter) if before[place] != after[place]), shorter)
    return f"{before[start : start + 12]!r} becomes {after[start : start + 12]!r}, character {start}"


def _date_in_template(facts: TokenFacts) -> str | None:
    return "the chat template writes today's date into every conversation (strftime_now)" if facts.reads_clock else None


TemplateCheck = Callable[[TokenFacts], str | None]
BatchCheck = Callable[[IdBatch, TokenFacts], Found]
SampleCheck = Callable[[Sequence[PreferencePair], Sequence[TokenizedPair], TokenFacts], Found]

TEMPLATE_RULES: tuple[Rule[TemplateCheck], ...] = (
    Rule(
        "date_in_template",
        "warning",
        "whether the chat template writes today's date",
        "Nothing to do: the date of the first day is kept for all runs. A served model is told the day on which it is "
        "asked; --prompt_template takes a template without a date.",
        _date_in_template,
    ),
)

BATCH_RULES: tuple[Rule[BatchCheck], ...] = (
    Rule(
        "bos",
        "error",
        "that a prompt begins with one BOS where the model wants one, and no answer holds one",
        "Look at the chat template with --preview 1: it writes BOS twice, or none.",
        _bos,
    ),
    Rule(
        "end_token",
        "error",
        "that an answer ends with the token that ends a turn, unless it was cut, and has it nowhere else",
        "Look at the chat template with --preview 1: the model would not learn to stop.",
        _end_token,
    ),
    Rule(
        "unknown_token",
        "warning",
        "characters that the tokenizer has no tokens for",
        "Remove the characters or take another base model: it can neither read nor write them.",
        _unknown_token,
    ),
)

SAMPLED = 1000
SAMPLE_RULES: tuple[Rule[SampleCheck], ...] = (
    Rule(
        "boundary",
        "error",
        f"that prompt and answer have the ids that generation sees and writes; up to {SAMPLED:,} rows spread over all",
        "Delete the cache of tokenized pairs; if that does not help, the template writes something else each time.",
        _boundary,
    ),
    Rule(
        "round_trip",
        "warning",
        f"that the ids of an answer decode to its text; up to {SAMPLED:,} rows spread over all",
        "The tokenizer loses this text; nothing to do where it is meant to (lower-casing, joined spaces).",
        _round_trip,
    ),
)
