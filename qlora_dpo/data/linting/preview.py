"""Shows the very tokens of a sample: what is only read, what is trained on, and where an answer ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.tokenization import TokenizedPair
from qlora_dpo.terminal import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ANSI: grey, green, red, magenta; the end token is inverted.
_COLORS = {"prompt": "90", "chosen": "32", "rejected": "31", "completion": "32", "masked": "35"}
_INVERTED = "7"
_MEANINGS = {
    "prompt": "read, masked in the loss",
    "masked": "read, masked in the loss",
    "chosen": "trained on",
    "rejected": "trained on",
    "completion": "trained on",
}

_LONGEST = 16  # tokens that are looked at for a whole character: 4 bytes each, and parts of neighbours in one token

Sample = TokenizedPair | TokenizedConversation


def use_color() -> bool:
    """Colors are for a terminal whose user has not set NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def preview(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, end_id: int, color: bool | None = None
) -> list[str]:
    """The tokens of the samples in lines; without color each end token has a mark."""
    color = use_color() if color is None else color
    return [line for sample in samples for line in _lines(sample, tokenizer, end_id, color)]


def _lines(sample: Sample, tokenizer: PreTrainedTokenizerBase, end_id: int, color: bool) -> Iterator[str]:
    yield visible(sample.origin)
    for kind, ids in _parts(sample):
        yield f"  {_painted(kind, _COLORS[kind], color)} ({len(ids):,} tokens, {_MEANINGS[kind]})"
        is_answer = kind in ("chosen", "rejected", "completion")
        tokens = list(_texts_of(tokenizer, ids))
        shown = [_painted(token, _COLORS[kind], color) for token in tokens]
        if is_answer and ids[-1] == end_id:
            code = f"{_COLORS[kind]};{_INVERTED}"
            shown[-1] = _painted(tokens[-1], code, True) if color else f"{tokens[-1]} <- end"
        elif is_answer:
            shown.append("[cut: no end token]")
        yield "    " + "|".join(shown)


def _parts(sample: Sample) -> Iterator[tuple[str, list[int]]]:
    if isinstance(sample, TokenizedPair):
        yield from (("prompt", sample.prompt_ids), ("chosen", sample.chosen_ids), ("rejected", sample.rejected_ids))
        return
    done = 0
    for start, end in sample.spans:
        if done < start:
            yield "masked" if done else "prompt", sample.ids[done:start]
        yield "completion", sample.ids[start:end]
        done = end
    if done < len(sample.ids):
        yield "masked", sample.ids[done:]


def _texts_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Iterator[str]:
    """The tokens as text, one by one; those that only together are whole characters as one, with their number."""
    place = 0
    while place < len(ids):
        count, text = _whole(tokenizer, ids[place : place + _LONGEST])
        shown = token_text(tokenizer, ids[place])
        yield shown if count == 1 else f"{_with_space(tokenizer, ids[place], text)}[{count}]"
        place += count


def _whole(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[int, str]:
    """How many tokens the first whole characters take, and their text; 1 where they are never whole."""
    backend: Any = tokenizer.backend_tokenizer
    for count in range(1, len(ids) + 1):
        text = backend.decode(list(ids[:count]), skip_special_tokens=False)
        if "\ufffd" not in text:
            return count, text
    return 1, ""


def token_text(tokenizer: PreTrainedTokenizerBase, id_: int) -> str:
    """A token as text, its leading space as U+2581; the token's own name where it is only a part of a character."""
    name = str(tokenizer.convert_ids_to_tokens(id_))
    backend: Any = tokenizer.backend_tokenizer
    text = backend.decode([id_], skip_special_tokens=False)
    if not text.strip(" ") or "\ufffd" in text:
        return visible(name)
    return _with_space(tokenizer, id_, text)


def _with_space(tokenizer: PreTrainedTokenizerBase, id_: int, text: str) -> str:
    """The text of tokens from `id_` on, escaped, their leading space as U+2581."""
    has_space = str(tokenizer.convert_ids_to_tokens(id_)).startswith(("▁", "Ġ", " "))
    return visible("▁" + text.lstrip(" ") if has_space else text)


def _painted(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
