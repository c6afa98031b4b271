"""The tokenizer of a release: the base's own files where training changed nothing in them, in a form that transformers
4 and 5 read, with nothing of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from qlora_dpo.data.control_tokens import tokenizer_content
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.models.loading import load_tokenizer
from qlora_dpo.release.artefact import Artefact, tokenizer_of

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
FILES = (
    "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", TEMPLATE, "chat_template.json",
)  # fmt: skip
# What transformers 5 notes about the place that a tokenizer was loaded from, and code that is not released with it.
_NOT_RELEASED = (
    "is_local", "local_files_only", "backend", "name_or_path", "tokenizer_file", "special_tokens_map_file", "auto_map",
)  # fmt: skip


def write_tokenizer(artefact: Artefact, folder: Path) -> None:
    """Write the tokenizer that the adapter was trained with.

    Raises:
        StorageError, ModelError: it cannot be read.
    """
    tokenizer = tokenizer_of(artefact)
    base = _folder_of_base(artefact)
    own = None if base is None else _tokenizer_in(base)
    if base is not None and own is not None and _is_same_but_for_template(tokenizer, own):
        for name in FILES:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        if tokenizer.chat_template != own.chat_template:
            _replace_template(folder, str(tokenizer.chat_template))
    else:
        tokenizer.save_pretrained(folder)
    file = folder / CONFIG
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(portable(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer_config.json as transformers 4 and 5 read it, without what is of this machine."""
    kept = {name: value for name, value in config.items() if name not in _NOT_RELEASED}
    if kept.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name for the same
        kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(kept.get("extra_special_tokens"), list):  # transformers 4 takes a mapping for one
        more = kept.pop("extra_special_tokens")
        kept["additional_special_tokens"] = [*kept.get("additional_special_tokens", ()), *more]
    return kept


def _folder_of_base(artefact: Artefact) -> Path | None:
    """Where the base's own tokenizer files lie; None where they cannot be had any more."""
    from huggingface_hub import snapshot_download

    folder = Path(artefact.origin.base).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(
            snapshot_download(artefact.origin.base, revision=artefact.origin.revision, allow_patterns=list(FILES))
        )
    except (OSError, ValueError):  # no Hub, no such model
        return None


def _tokenizer_in(folder: Path) -> Any:
    try:
        return load_tokenizer(str(folder))
    except QloraDpoError:
        return None


def _is_same_but_for_template(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers make the same ids of every text, and end it the same way."""
    template, other.chat_template = other.chat_template, tokenizer.chat_template
    try:
        return tokenizer_content(tokenizer) == tokenizer_content(other)
    finally:
        other.chat_template = template


def _replace_template(folder: Path, template: str) -> None:
    """Leave this chat template alone in the folder."""
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    file = folder / CONFIG
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("chat_template", None)
        file.write_text(json.dumps(content), encoding="utf-8")
