"""Tokenizers of the kinds that models bring, files of rows, and where real data would be."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# Refuses a system message, writes spaces around answers and ends them with </s>.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system message') }}"
    "{% elif m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog and writes an answer to the question of the user.",
    "Human: what is the answer? Assistant: the answer is here, system user assistant begin end.",
    "Below is an instruction that describes a task. ### Instruction: ### Response: helpful",
] * 20


def _byte_bpe(special: list[str], template: str | None, **tokens: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos := tokens.get("bos_token"):
        bos_id = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = template
    return tokenizer


def _chatml() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_bpe(special, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def _llama3() -> Any:
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    return _byte_bpe(special, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def _base() -> Any:
    from qlora_dpo.data.templates import apply_prompt_template

    tokenizer = _byte_bpe(["<s>", "</s>"], None, bos_token="<s>", eos_token="</s>")
    apply_prompt_template(tokenizer, "anima")
    return tokenizer


def _llama_sentencepiece() -> Any:
    from transformers import LlamaTokenizer

    if not (SHARED / "llama_tokenizer" / "tokenizer.model").is_file():
        pytest.skip("no LLaMA tokenizer in ../shared/data/llama_tokenizer")
    return LlamaTokenizer.from_pretrained(SHARED / "llama_tokenizer")


def _llama_hh() -> Any:
    from qlora_dpo.data.templates import apply_prompt_template

    tokenizer = _llama_sentencepiece()
    apply_prompt_template(tokenizer, "hh-rlhf")
    return tokenizer


def _llama2() -> Any:
    tokenizer = _llama_sentencepiece()
    tokenizer.chat_template = LLAMA2
    return tokenizer


TOKENIZERS = {
    "chatml": _chatml,
    "llama3": _llama3,
    "base": _base,
    "llama_hh": _llama_hh,
    "llama2": _llama2,
}


@pytest.fixture(scope="session")
def tokenizers() -> Callable[[str], Any]:
    """Give a tokenizer by kind, built once; tests leave them as they are."""
    built: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in built:
            built[kind] = TOKENIZERS[kind]()
        return built[kind]

    return get


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest, tokenizers: Callable[[str], Any]) -> Any:
    return tokenizers(request.param)


@pytest.fixture
def chatml(tokenizers: Callable[[str], Any]) -> Any:
    return tokenizers("chatml")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write rows (objects, or text to stand on a line as it is) and return the path."""

    def write(rows: Iterable[Any], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("no real data in ../shared/data")
    return SHARED
