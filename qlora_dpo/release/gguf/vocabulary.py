"""A tokenizer as GGUF keeps it: tokens, kinds, merges or scores, and the name of a way to cut text into words.

Nothing is written that was not tried: llama.cpp's tokenizer, rebuilt from what the file will hold, must give the
model's own ids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from qlora_dpo.errors import ModelError
from qlora_dpo.release.gguf.llama_cpp_tokens import (
    PRE_TYPES,
    byte_level_encoder,
    differing,
    named_in,
    own_ids,
    probe_texts,
    rendered_chats,
    sentencepiece_encoder,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file says about its tokenizer, apart from special ids and the chat template."""

    model: str
    """gpt2: byte-level BPE. llama: SentencePiece BPE with byte fallback."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    swallows: bool = False
    """Control tokens swallow the spaces after them."""
    notes: list[str] = field(default_factory=list)
    """What a user has to know."""


def gguf_vocabulary(tokenizer: Any, size: int, folder: Path) -> GgufVocabulary:
    """The vocabulary, filled up to the `size` rows of the embeddings; `folder` may hold a tokenizer.model.

    Raises:
        ModelError: llama.cpp has no tokenizer that gives the same ids.
    """
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise ModelError(f"{folder}: the tokenizer {name} has no tokenizer.json. Save it as one.")
    if len(tokenizer) > size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer):,} tokens, but the embeddings have {size:,} rows. One of "
            "them is of another model."
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = content["model"].get("type")
    if kind == "BPE" and content["model"].get("byte_fallback"):
        return _sentencepiece(tokenizer, content, size, folder)
    if kind == "BPE" and '"ByteLevel"' in json.dumps(content.get("pre_tokenizer")):
        return _byte_level(tokenizer, content, size, folder)
    raise ModelError(
        f"{folder}: its tokenizer is {kind}, for which no GGUF is written; only byte-level BPE (Llama 3, Qwen2) and "
        "SentencePiece BPE with byte fallback (LLaMA) are. Serve the folder with vLLM or transformers instead."
    )


def _byte_level(tokenizer: Any, content: dict[str, Any], size: int, folder: Path) -> GgufVocabulary:
    tokens, types = _tokens(tokenizer, content, size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return GgufVocabulary("gpt2", _pre_type(tokenizer, folder), tokens, types, merges)


def _pre_type(tokenizer: Any, folder: Path) -> str:
    """The pre-type that gives the tokenizer's own ids; those that its file names are tried first."""
    texts = probe_texts(tokenizer)
    texts += rendered_chats(tokenizer, texts)
    expected = own_ids(tokenizer, texts)
    others: dict[str, list[int]] = {}
    for name in sorted(PRE_TYPES, key=lambda name: not named_in(tokenizer, PRE_TYPES[name])):
        others[name] = differing(expected, byte_level_encoder(tokenizer, PRE_TYPES[name])(texts))
        if not others[name]:
            return name
    nearest = min(others, key=lambda name: len(others[name]))
    raise ModelError(
        f"{folder}: its tokenizer cuts text into words in a way that llama.cpp has no known name for. The nearest, "
        f"{nearest}, gives other ids for {len(others[nearest])} of {len(texts)} texts, such as "
        f"{texts[others[nearest][0]][:60]!r}. Serve the folder with vLLM or transformers instead."
    )


def _sentencepiece(tokenizer: Any, content: dict[str, Any], size: int, folder: Path) -> GgufVocabulary:
    tokens, types = _tokens(tokenizer, content, size)
    scores = _scores(tokens, types, content["model"]["merges"], folder / "tokenizer.model")
    texts = probe_texts(tokenizer)
    chats = rendered_chats(tokenizer, texts)
    plain, in_chats = own_ids(tokenizer, texts), own_ids(tokenizer, chats)
    tried: dict[tuple[bool, bool], tuple[list[int], list[int]]] = {}
    for prefix, swallows in product((True, False), {False, _has_swallowing(tokenizer)}):
        encode = sentencepiece_encoder(tokenizer, tokens, scores, types, add_space_prefix=prefix, swallows=swallows)
        tried[prefix, swallows] = differing(in_chats, encode(chats)), differing(plain, encode(texts))
    best = min(tried, key=lambda settings: [len(places) for places in tried[settings]])
    in_chat, in_plain = tried[best]
    wrong = [chats[place] for place in in_chat] if chats else [texts[place] for place in in_plain]
    if wrong:
        raise ModelError(
            f"{folder}: llama.cpp would give other ids than this tokenizer for {len(wrong)} of "
            f"{len(chats) or len(texts)} texts, such as {wrong[0][:60]!r}. Serve the folder with vLLM or transformers."
        )
    notes = []
    if in_plain:
        notes.append(
            "A chat gets the ids of the model's tokenizer. A raw text without the chat template does not "
            f"({len(in_plain)} of {len(texts)}): llama.cpp treats the space before its first word in another way."
        )
    return GgufVocabulary("llama", "default", tokens, types, [], scores, *best, notes)


def _has_swallowing(tokenizer: Any) -> bool:
    return any(token.rstrip for token in tokenizer.added_tokens_decoder.values())


def _tokens(tokenizer: Any, content: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its id, and its kind."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    has_bytes = bool(content["model"].get("byte_fallback"))
    for token, id_ in content["model"]["vocab"].items():
        is_byte = has_bytes and len(token) == 6 and token.startswith("<0x")
        tokens[id_], types[id_] = token, BYTE if is_byte else NORMAL
    for id_, added in tokenizer.added_tokens_decoder.items():
        tokens[id_], types[id_] = added.content, CONTROL if added.special else USER_DEFINED
    if has_bytes and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN
    return tokens, types


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Any], file: Path) -> list[float]:
    """What orders the merges: the scores of tokenizer.model where that is there, else the order of the merges."""
    if file.is_file():
        from sentencepiece import SentencePieceProcessor

        processor = SentencePieceProcessor(model_file=str(file))
        known = {processor.id_to_piece(id_): processor.get_score(id_) for id_ in range(processor.get_piece_size())}
    else:
        pieces = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges]
        known = {piece: -float(rank) for rank, piece in reversed(list(enumerate(pieces)))}
    least = min(known.values(), default=0.0) - 1.0
    return [known.get(token, least) if kind == NORMAL else 0.0 for token, kind in zip(tokens, types, strict=True)]
