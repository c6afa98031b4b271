"""Shows the very tokens of a sample: what is only read, what is trained on, and where an answer ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.tokenization import TokenizedPair

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
        tokens = [token_text(tokenizer, id_) for id_ in ids]
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


def token_text(tokenizer: PreTrainedTokenizerBase, id_: int) -> str:
    """A token as text, its leading space as U+2581; the token's own name where it is only a part of a character."""
    name = str(tokenizer.convert_ids_to_tokens(id_))
    backend: Any = tokenizer.backend_tokenizer
    text = backend.decode([id_], skip_special_tokens=False)
    if not text.strip(" ") or "\ufffd" in text:
        return visible(name)
    has_space = name.startswith(("▁", "Ġ", " "))
    return visible("▁" + text.lstrip(" ") if has_space else text)


def visible(text: str) -> str:
    """The text with everything escaped that a terminal would obey or hide."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _painted(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
