"""What llama.cpp makes of a text: its two tokenizers, built here out of libraries that do the same, to compare ids.

A GGUF file names a tokenizer of llama.cpp by a word. Whether it splits text as the model's own tokenizer does is not
looked up by the model's name: it is tried, on texts made of the whole vocabulary.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.control_tokens import control_tokens

Encode = Callable[[Sequence[str]], list[list[int]]]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreType:
    """How llama.cpp cuts a text into words under one value of `tokenizer.ggml.pre`."""

    patterns: tuple[str, ...]
    """Each cuts what the ones before it left."""
    ignore_merges: bool = False
    """A word that is a token is that token, whatever the merges say."""


PRE_TYPES = {
    "llama-bpe": PreType((_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST,), ignore_merges=True),
    "dbrx": PreType((_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST,)),
    "qwen2": PreType((_CONTRACTIONS + _WORDS + r"|\p{N}" + _REST,)),
    "smollm": PreType((r"\p{N}", _GPT2)),
    "gpt-2": PreType((_GPT2,)),
}

_TEXTS = (
    "Hello, world!", "It's 3.14159 and 1234567890, isn't it?  WE'LL see.", "a\n\nb\r\n  c\t\td   ",
    "x:\n    indented\n\tcode();",
    "Ωμέγα, Привет мир, नमस्ते, สวัสดี, 안녕하세요, こんにちは", "中文分词：我们2024年去北京。好吗？", "东西 south南north",
    "naïve café — “quotes” … 🚀🌍 👩‍💻", "x = y**2 + z_1; // https://example.org/a?b=c&d=%20", "!!!???...---===",
    "ＡＢＣ１２３ ½ Ⅷ ²", "\u200b\u00a0zero\u200bwidth", "e\u0301 combined", "''' \"\"\" ```python\nprint('a')\n```",
)  # fmt: skip
_MADE, _TOKENS_EACH = 1000, 6
_SPACES = " \t\n\v\f\r"
_KEEP = ("<unk>", "<s>", "<|endoftext|>")  # tokens that swallow no spaces in Phi-3


def probe_texts(tokenizer: Any) -> list[str]:
    """Difficult texts, and texts made of the vocabulary's own tokens, drawn with a fixed seed."""
    draw = random.Random(0)
    plain = sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder))
    drawn = draw.sample(plain, min(len(plain), _MADE * _TOKENS_EACH))
    whole = [id_ for id_ in drawn if "\ufffd" not in tokenizer.decode([id_])]  # a lone byte of a character is no text
    made = [tokenizer.decode(draw.choices(whole, k=_TOKENS_EACH)) for _ in range(_MADE)] if whole else []
    # llama.cpp leaves Unicode as it is, where some tokenizers bring it to its composed form.
    texts = [unicodedata.normalize("NFC", text) for text in (*_TEXTS, *made)]
    # It also counts only ASCII's spaces as spaces, which matters after a token that swallows them.
    begins = [text for text in texts if text.strip() and (text[0].isascii() or not text[0].isspace())]
    return [text for text in begins if text[0] not in " ▁" and "\ufffd" not in text]


def byte_level_encoder(tokenizer: Any, pre: PreType) -> Encode:
    """Byte-level BPE with the tokenizer's vocabulary, merges and added tokens, and the words of a pre-type."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content |= {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "truncation": None,
        "padding": None,
    }
    content["model"]["ignore_merges"] = pre.ignore_merges
    for token in content["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False  # which a GGUF file does not say
    backend = Tokenizer.from_str(json.dumps(content))
    return lambda texts: [found.ids for found in backend.encode_batch(list(texts), add_special_tokens=False)]


def named_in(tokenizer: Any, pre: PreType) -> bool:
    """The tokenizer's own file has the patterns of this pre-type."""
    content = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer")
    text = json.dumps(content)
    builtin = pre.patterns[-1] == _GPT2 and '"use_regex": true' in text
    patterns = pre.patterns[:-1] if builtin else pre.patterns
    return all(json.dumps(pattern) in text or (pattern == r"\p{N}" and "Digits" in text) for pattern in patterns)


def sentencepiece_encoder(
    tokenizer: Any, tokens: Sequence[str], scores: Sequence[float], types: Sequence[int], *,
    add_space_prefix: bool, swallows: bool,
) -> Encode:  # fmt: skip
    """SentencePiece BPE over each stretch of text between added tokens, as llama.cpp reads such a vocabulary.

    `swallows`: added tokens take the spaces after them, which llama.cpp does where the model's name holds phi-3.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.trainer_spec.model_type = 2  # BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
    for number, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        # What is added never takes part in merges; a name of its own keeps it out of the text.
        piece = f"\ue000{number}" if number in added or kind == 5 else token
        model.pieces.add(piece=piece, score=score, type=5 if number in added and kind != 2 else kind)
    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    ids = {content: id_ for id_, content in added.items()}
    border = re.compile("|".join(map(re.escape, sorted(ids, key=len, reverse=True))) or r"(?!)")

    def of_stretch(text: str) -> list[int]:
        found: list[int] = processor.encode(f" {text}" if add_space_prefix else text) if text else []
        return found

    def encode(text: str) -> list[int]:
        found: list[int] = []
        start = 0
        for match in border.finditer(text):
            found += [*of_stretch(text[start : match.start()]), ids[match[0]]]
            rest = text[match.end() :]
            start = len(text) - len(rest.lstrip(_SPACES) if swallows and match[0] not in _KEEP else rest)
        return found + of_stretch(text[start:])

    return lambda texts: [encode(text) for text in texts]


def own_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of the tokenizer itself, with nothing added."""
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    return found


def differing(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> list[int]:
    """The places of texts with other ids."""
    return [place for place, (one, other) in enumerate(zip(expected, found, strict=True)) if list(one) != list(other)]


def rendered_chats(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Each text as a user's message, as the chat template writes it; texts that hold control tokens are left out."""
    if not tokenizer.chat_template:
        return []
    controls = [token.content for token in control_tokens(tokenizer).values()]
    chats = [[{"role": "user", "content": text}] for text in texts if not any(control in text for control in controls)]
    return list(tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True))
