"""Text to token ids with control tokens only where the chat template wrote them.

A row may hold text such as `<|im_end|>`. It must reach the model as text: otherwise a data file could end a
turn, or speak as the system. Three things together do that, in one pass over the text that the model will
see:

1. Such text in a message is replaced by a marker before the template is rendered.
2. The control tokens that are then in the rendered prompt come from the template; each becomes a stand-in.
3. The markers become text again, and a copy of the tokenizer that knows the stand-ins, and takes every real
   control token for text, does the rest.
"""

from __future__ import annotations

import datetime
import re
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_dpo.data.template_clock import pinned_date, reads_clock
from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEVER = re.compile(r"(?!)")
_WINDOW = 80  # characters: more than a token has, and than what pre-tokenizers look at


class ControlTokenEncoder:
    """Encodes batches of text with one tokenizer; `protect` and `reveal` go around a template's rendering."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import AddedToken

        specials = control_tokens(tokenizer)
        self._nonce = nonce = secrets.token_hex(8)  # so that no row can hold a marker
        texts = [token.content for token in specials.values()]
        self.pattern = _any_of(texts)
        self._markers = {text: f"{nonce}m{number}m" for number, text in enumerate(texts)}
        self._stand_ins = {text: f"<{nonce}s{number}>" for number, text in enumerate(texts)}
        self._marker_pattern = re.compile(f"{nonce}m([0-9]+)m")
        self._stand_in_pattern = re.compile(f"<{nonce}s([0-9]+)>")
        self._texts = texts
        self._starts = {text[:2] for text in texts}
        self._backend = _copy_backend(tokenizer)
        self._backend.encode_special_tokens = True
        self._backend.add_tokens(
            [
                AddedToken(stand_in, lstrip=real.lstrip, rstrip=real.rstrip, normalized=False, special=False)
                for stand_in, real in zip(self._stand_ins.values(), specials.values(), strict=True)
            ]
        )
        stand_in_ids = [self._backend.token_to_id(text) for text in self._stand_ins.values()]
        self._real_ids: dict[int, int] = dict(zip(stand_in_ids, specials, strict=True))
        self._first_stand_in = min(stand_in_ids, default=0)
        # Behind any stand-in a text is encoded as within a text, without what some tokenizers begin every text with.
        self._anchor = next(iter(self._stand_ins.values()), "")

    def protect(self, content: str) -> str:
        """Replace control text in a message by markers that every template passes on."""
        if not any(start in content for start in self._starts):  # as in nearly all texts
            return content
        return self.pattern.sub(lambda match: self._markers[match[0]], content)

    def reveal(self, rendered: str) -> str:
        """Turn a rendered template into text to encode: control tokens to stand-ins, markers back to text."""
        text = self.pattern.sub(lambda match: self._stand_ins[match[0]], rendered)
        if self._nonce + "m" not in text:
            return text
        return self._marker_pattern.sub(lambda match: self._texts[int(match[1])], text)

    def readable(self, text: str) -> str:
        """A text for the encoder with control tokens by their names."""
        return self._stand_in_pattern.sub(lambda match: self._texts[int(match[1])], text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as they are; only stand-ins become control tokens, and nothing is added."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        real, first = self._real_ids, self._first_stand_in
        return [
            [id_ if id_ < first else real.get(id_, id_) for id_ in encoding.ids]
            if self._nonce in text
            else encoding.ids
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def encode_behind(self, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as continuations: with the ids that they have behind the text before them.

        Where a token would reach across the border the two are encoded apart, as they are when a model generates. Only
        the end of the text before is looked at: from its last control token on, at most `_WINDOW` characters.
        """
        windows = [self._window(text) for text in before]
        different = list(dict.fromkeys(windows))
        begins = dict(zip(different, self.encode(different), strict=True))
        encoded = self.encode([window + text for window, text in zip(windows, texts, strict=True)])
        results, apart = [], []
        for number, (window, ids) in enumerate(zip(windows, encoded, strict=True)):
            begin = begins[window]
            if ids[: len(begin)] != begin:
                apart.append(number)
            results.append(ids[len(begin) :])
        for number, ids in zip(apart, self.encode([self._anchor + texts[number] for number in apart]), strict=True):
            results[number] = ids[1:] if self._anchor else ids
        return results

    def _window(self, text: str) -> str:
        start = max(0, len(text) - _WINDOW)
        control = text.rfind(f"<{self._nonce}s", start)
        if control >= 0:
            return text[control:]
        line = text.find("\n", start, len(text) - 1) if start else 0
        return text[max(line, start) :]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, Any]:
    """Return the control tokens by id; added tokens that are ordinary text (`<think>`) are not among them."""
    added = tokenizer.added_tokens_decoder
    return {id_: token for id_, token in added.items() if token.special and token.content}


def uses_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether the model expects a BOS token before every text."""
    if tokenizer.bos_token_id is None:
        return False
    if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        return True
    # A LLaMA tokenizer read from its SentencePiece file alone should add BOS by its own documentation, and
    # transformers 5.23 does not. What a tokenizer_config.json says outranks this.
    from_sentencepiece = str(getattr(tokenizer, "vocab_file", "")).endswith(".model")
    is_llama = type(tokenizer).__name__.startswith("LlamaTokenizer")
    return is_llama and from_sentencepiece and "add_bos_token" not in tokenizer.init_kwargs


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all of a tokenizer that ids depend on, as text to hash."""
    backend = _copy_backend(tokenizer)
    parts: tuple[Any, ...]
    parts = (tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id, uses_bos(tokenizer))
    if reads_clock(tokenizer):
        parts = (*parts, pinned_date(tokenizer) or datetime.date.today().isoformat())
    return f"{backend.to_str()}\n{parts!r}"


def _copy_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise UsageError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizers backend, so control tokens in the "
            "data cannot be kept apart from text; save the model's tokenizer as a tokenizer.json first."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _any_of(texts: list[str]) -> re.Pattern[str]:
    # Longest first, as the tokenizer itself prefers.
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else _NEVER
