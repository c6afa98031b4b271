"""Fixtures for all tests: a model folder, a pairs file, the real data where there is some."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a process whose disk is full would leave half a .pyc for all others
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from tiny import random_pairs, tiny_model, tiny_tokenizer

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed, where it is installed, warns of what it has to find out

# A shell ignores SIGINT in what it starts with `&`, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What fixtures of a whole module or session compute does not go into the user's cache either."""
    os.environ["QLORA_DPO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, where there is one."""
    if not SHARED.is_dir():
        pytest.skip("the shared folder with real data is not beside this clone")
    return SHARED / "data"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with its tokenizer, saved as a user would have it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs in the words of the tiny tokenizer."""

    def text(ids: list[int]) -> str:
        return " ".join(f"w{number}" for number in ids)

    generator = torch.Generator().manual_seed(3)
    lengths = (torch.randint(1, 9, (40, 3), generator=generator) + 1).tolist()
    rows = [
        {
            "prompt": text(pair.prompt_ids),
            "chosen": text(pair.chosen_ids),
            "rejected": text(pair.rejected_ids),
        }
        for pair in random_pairs([tuple(row) for row in lengths])
    ]
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never read or fill the user's cache, nor each other's."""
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path_factory.mktemp("cache")))
