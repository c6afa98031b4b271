"""The tokenizer is the one that the model was trained with."""

from __future__ import annotations

import shutil
from pathlib import Path

import sentencepiece
from tiny import tiny_config

from qlora_dpo.models.loading import load_tokenizer

TEXT = "Water boils at 100 °C. 水在一百度沸腾。"


def test_bare_sentencepiece_file_gives_its_own_ids(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "llama_tokenizer" / "tokenizer.model", tmp_path)
    tiny_config(vocab_size=32_000).save_pretrained(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(TEXT)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.pad_token_id is not None
