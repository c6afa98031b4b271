"""A release's tokenizer loads wherever the base's did, also in transformers 4, and makes the same ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from release.tiny_adapters import save_adapter, save_base
from tiny import tiny_tokenizer

from qlora_dpo.release.artefact import open_artefact
from qlora_dpo.release.tokenizer_files import portable, write_tokenizer

OLD = "4.57.6"
LOAD = """
import json, sys
from transformers import AutoTokenizer, __version__
tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in sys.argv[1:]]
messages = [{"role": "user", "content": "w7 w8"}]
print(json.dumps([__version__, *[
    [t("w6 w9 <think> w4").input_ids, t.apply_chat_template(messages, tokenize=False), t.eos_token] for t in tokenizers
]]))
"""


@pytest.fixture(scope="session")
def transformers_4() -> Path:
    """A folder with an older transformers, made once on a machine."""
    folder = Path(tempfile.gettempdir()) / f"qlora_dpo-tests-transformers-{OLD}"
    if not (folder / "transformers").is_dir():
        needed = [f"transformers=={OLD}", "tokenizers<0.23", "huggingface_hub<1"]
        words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--retries", "0", "--timeout", "10"]
        staged = folder.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*words, "--target", str(staged), *needed], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"pip cannot install transformers {OLD}: {(done.stderr.strip() or '?').splitlines()[-1][:200]}")
        staged.rename(folder)
    return folder


def loaded(path: Path | None, *folders: Path) -> list[Any]:
    """What another process makes of each folder."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(path)} if path else {})
    command = [sys.executable, "-c", LOAD, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def old_form(folder: Path) -> None:
    """As transformers 4 wrote it: the template in tokenizer_config.json, added tokens there too."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    content = {
        "added_tokens_decoder": {str(token["id"]): {name: token[name] for name in names} for token in added},
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "w3", "name_or_path": str(folder),
        "chat_template": (folder / "chat_template.jinja").read_text(), "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").unlink()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    base = save_base(tmp_path / "base")
    old_form(base)
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    return tmp_path / "adapter"


def written(adapter: Path) -> Path:
    folder = adapter.parent / "written"
    folder.mkdir()
    write_tokenizer(open_artefact(adapter), folder)
    return folder


def test_files_of_the_base_are_copied_where_nothing_changed(adapter: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(adapter.parent / "base").save_pretrained(adapter)  # as a run leaves it
    folder, base = written(adapter), adapter.parent / "base"
    assert {file.name for file in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    content = json.loads((base / "tokenizer_config.json").read_text())
    del content["name_or_path"]
    assert json.loads((folder / "tokenizer_config.json").read_text()) == content


def with_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ 'w9 w4' }}"


def with_added_token(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda _: None, with_template, with_added_token])
def test_both_versions_of_transformers_read_what_is_written(change: Any, adapter: Path, transformers_4: Path) -> None:
    tokenizer = tiny_tokenizer()
    change(tokenizer)
    tokenizer.save_pretrained(adapter)
    folder = written(adapter)
    text = (folder / "tokenizer_config.json").read_text()
    assert str(adapter.parent) not in text and "local" not in text and "TokenizersBackend" not in text
    (_, new), (version, old) = loaded(None, adapter), loaded(transformers_4, folder)
    assert version == OLD
    assert old == new == loaded(None, folder)[1]


def test_what_is_of_this_machine_is_left_out() -> None:
    noted = {
        "is_local": True, "local_files_only": False, "name_or_path": "/home/me/base", "tokenizer_file": "/tmp/x",
        "auto_map": {"AutoTokenizer": "x--y.Z"}, "backend": "tokenizers", "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<a>"], "additional_special_tokens": ["<b>"], "eos_token": "</s>",
    }  # fmt: skip
    kept = {
        "tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<b>", "<a>"], "eos_token": "</s>",
    }  # fmt: skip
    assert portable(noted) == kept == portable(kept)
