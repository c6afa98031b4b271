"""Small models of the families that are written as GGUF, with tokenizers of their kinds."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model

from qlora_dpo.cli import main
from qlora_dpo.release.gguf.llama_cpp_tokens import PRE_TYPES

FAMILIES = ("qwen3", "mistral", "gemma3", "phi3")
TEXTS = (
    "Hello, world!", "It's 12345.67, isn't it?", "two  spaces\n\nand lines", "中文和 English 混排。", "émigré 🚀", "a",
    "<|user|>a turn<|end|>",
)  # fmt: skip
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' + message['content']"
    " | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 1234 o'clock!",
    "中文分词：我们去北京。",
    "def f(x):\n    return x",
    *TEXTS,
]


def byte_level(pre: str, extra: list[str], merges: int = 120) -> Any:
    """A small byte-level BPE tokenizer that cuts words as a pre-type does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=PRE_TYPES[pre].ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TYPES[pre].patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, special_tokens=extra, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=extra[0], pad_token=extra[0])


def write_sentencepiece(file: Path) -> Path:
    """A small tokenizer.model of LLaMA's kind."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 5), model_writer=written, vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    file.write_bytes(written.getvalue())
    return file


def sentencepiece(file: Path, template: str, added: Sequence[str], *, rstrip: bool) -> Any:
    """LLaMA's tokenizer with control tokens beside its own."""
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(file.parent)
    tokens = [AddedToken(text, rstrip=rstrip, normalized=False, special=True) for text in added]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens})
    tokenizer.pad_token = tokenizer.eos_token = "</s>"
    tokenizer.chat_template = template
    return tokenizer


def gemma_tokenizer(file: Path) -> Any:
    """The same vocabulary as Gemma reads it: no space before the first word."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    kept = sentencepiece(file, GEMMA, ("<start_of_turn>", "<end_of_turn>"), rstrip=False)
    content = json.loads(kept.backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    content |= {"pre_tokenizer": split, "post_processor": None}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="</s>", chat_template=GEMMA,
    )  # fmt: skip


def make_family(family: str, folder: Path, file: Path) -> Path:
    """A saved model of a family that has every setting of it that GGUF knows; `file` is a tokenizer.model."""
    if family == "qwen3":
        tokenizer = byte_level("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = CHATML
        return save(folder, "qwen3", tokenizer, head_dim=32, tie_word_embeddings=True)
    if family == "mistral":
        return save(folder, "mistral", sentencepiece(file, LLAMA_2, (), rstrip=False), head_dim=32, sliding_window=64)
    if family == "gemma3":
        rope = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
        return save(
            folder, "gemma3_text", gemma_tokenizer(file), head_dim=32, query_pre_attn_scalar=32, sliding_window=16,
            num_hidden_layers=7, rope_parameters=rope, tie_word_embeddings=True,
        )  # fmt: skip
    factors = [1.0 + 0.1 * place for place in range(6)]
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "short_factor": factors,
        "long_factor": [4 * factor for factor in factors],
    }  # fmt: skip
    tokenizer = sentencepiece(file, PHI_3, ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"), rstrip=True)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    return save(
        folder, "phi3", tokenizer, head_dim=None, rope_parameters=rope, original_max_position_embeddings=256,
        max_position_embeddings=1024, sliding_window=512,
    )  # fmt: skip


def save(folder: Path, model_type: str, tokenizer: Any, **changes: Any) -> Path:
    model = tiny_model(
        model_type, vocab_size=len(tokenizer) + 3, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones or zeros
                parameter.add_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path, file: Path, *options: str) -> None:
    assert main(["release", "gguf", str(folder), "--output", str(file), *options]) == 0


def read(file: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    return AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32), AutoTokenizer.from_pretrained(**source)


def plain(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}
