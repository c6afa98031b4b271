"""The tokenizer is the one that the model was trained with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from tiny import tiny_config, tiny_model

from qlora_dpo.models.loading import load_base, load_tokenizer
from qlora_dpo.models.lora import has_dropout

TEXT = "Water boils at 100 °C. 水在一百度沸腾。"


def test_bare_sentencepiece_file_gives_its_own_ids(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "llama_tokenizer" / "tokenizer.model", tmp_path)
    tiny_config(vocab_size=32_000).save_pretrained(tmp_path)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).encode(TEXT)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.pad_token_id is not None


def test_base_is_loaded_without_its_own_dropout(tmp_path: Path) -> None:
    shape = {"n_embd": 64, "n_head": 4, "n_layer": 2}
    dropping = tiny_model("gpt2", attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1, **shape)
    assert has_dropout(dropping)
    dropping.save_pretrained(tmp_path)
    base = load_base(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
    assert not has_dropout(base)
    ids = torch.tensor([[1, 5, 6]])
    assert torch.equal(base.train()(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.slow
def test_the_commit_of_a_hub_model_is_known(model_folder: Path, tmp_path: Path) -> None:
    """A continued run compares it, and an adapter names it."""
    commit, repository = "0123456789" * 4, tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import torch; from qlora_dpo.models.loading import commit_of, load_base, load_config\n"
        "print(commit_of(load_config('somebody/tiny')))\n"
        "print(commit_of(load_base('somebody/tiny', device=torch.device('cpu')).config))\n"
        f"print(commit_of(load_config({str(model_folder)!r})))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [commit, commit, "None"], done.stderr
