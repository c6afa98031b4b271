"""Which files of a folder are released, which stay and why, and what is changed in them on the way."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.release import tokenizer_files
from qlora_dpo.release.cards.records import (
    ADAPTER_CONFIG,
    CHECK_REPORT,
    GGUF_REPORT,
    MERGE_REPORT,
    MODEL_CONFIG,
    WEIGHTS,
    Kind,
)
from qlora_dpo.training.folder.run_folder import CARD, CURVES
from qlora_dpo.training.trained_on import BASE_HELD

LARGEST_TEXT = 64 << 20
_TOKENIZER = (*tokenizer_files.FILES, "additional_chat_templates/*.jinja")
_TEXTS = (CARD, "LICENSE*", "NOTICE*", "USE_POLICY*", CURVES, CHECK_REPORT, *_TOKENIZER)
_OF_MERGED = (WEIGHTS["gguf"], "Modelfile", "generation_config.json", MERGE_REPORT, GGUF_REPORT)
ALLOWED: dict[Kind, tuple[str, ...]] = {
    "adapter": (WEIGHTS["adapter"], ADAPTER_CONFIG, BASE_HELD, *_TEXTS),
    "merged": (WEIGHTS["merged"], "model.safetensors.index.json", MODEL_CONFIG, *_OF_MERGED, *_TEXTS),
    "gguf": (*_OF_MERGED, *_TEXTS),
}
# The first pattern that fits says why a file stays.
_REASONS = (
    ("checkpoint-*", "a checkpoint: an earlier state, with optimizer and random states"),
    ("compare*", "answers to your prompts; the card has the numbers"),
    ("pairs", "data: rows of the data set"),
    ("*.pt", "a pickle: loading one can run code"),
    ("*.pth", "a pickle: loading one can run code"),
    ("*.bin", "a pickle: loading one can run code"),
    ("*.pkl", "a pickle: loading one can run code"),
    ("*.ckpt", "a pickle: loading one can run code"),
    ("optimizer*", "a state of the training"),
    ("scheduler*", "a state of the training"),
    ("rng_state*", "a state of the training"),
    ("trainer_state.json", "a state of the training"),
    ("manifest.json", "a state of the training"),
    ("config.yaml", "paths of this machine; the card has the options"),
    ("run.json", "a description of this machine"),
    ("data.json", "the card says what it says"),
    (MERGE_REPORT, "of another folder, which was merged from this adapter"),
    ("before_after.json", "answers to your prompts; the card has some"),
    ("samples.jsonl", "answers to your prompts; the card has some"),
    ("metrics.jsonl", "a log; the card has the last numbers"),
    ("*.jsonl", "data or a log"),
    ("*.csv", "data"),
    ("*.parquet", "data"),
    ("*.arrow", "data"),
    ("*.log", "a log"),
    ("*.sqlite*", "a reference store"),
    ("*.db", "a data base"),
)
_WITH_PATHS = (
    MODEL_CONFIG,
    tokenizer_files.CONFIG,
    "generation_config.json",
    MERGE_REPORT,
    GGUF_REPORT,
    CHECK_REPORT,
    BASE_HELD,
)
_LOCAL_PATH = re.compile(r"(?:~|[A-Za-z]:)?[/\\][^/\\\n]+[/\\][^\n]*")


@dataclass(frozen=True)
class Sent:
    """A file that is released."""

    name: str
    """In the repository."""
    content: bytes | Path
    """What was read, looked through and perhaps changed; of weights the file, from which they are streamed."""
    note: str = ""
    state: tuple[int, int, int] | None = None
    """Inode, size and time of the file, to notice that it changed meanwhile."""

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def has_changed(self) -> bool:
        """Whether the file is another one than it was."""
        return isinstance(self.content, Path) and self.state is not None and _state(self.content) != self.state


@dataclass(frozen=True)
class LeftOut:
    """A file, or a folder with all that is in it, that stays."""

    name: str
    size: int
    reason: str


def sort_files(folder: Path, kind: Kind) -> tuple[list[Sent], list[LeftOut]]:
    """(what is released, what stays).

    Raises:
        StorageError: a file cannot be read.
        ModelError: a file that should be text is too large for one.
    """
    sent, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name == "additional_chat_templates" and path.is_dir() and not path.is_symlink():
            inside = sorted(path.iterdir())
        else:
            inside = [path]
        for file in inside:
            name = file.relative_to(folder).as_posix()
            reason = _why_not(folder, file, name, kind)
            if reason is None:
                sent.append(_read(file, name))
            elif file.is_symlink() or not file.is_dir() or any(_sizes(file)):
                left_out.append(_left_out(file, name, reason))
    return sent, left_out


def without_local_paths(
    files: list[Sent], base: str | None, base_model_id: str | None, revision: str | None
) -> list[Sent]:
    """The files with the base's Hub id instead of `base`, its path here, and with the last part of other paths."""
    return [_cleaned(file, base, base_model_id, revision) for file in files]


def _why_not(folder: Path, file: Path, name: str, kind: Kind) -> str | None:
    """Why a file stays; None for one that goes."""
    if file.name.startswith("."):
        return "hidden"
    if file.is_symlink():
        target = file.resolve()
        if not target.is_relative_to(folder.resolve()):
            return "a link that leads out of the folder"
        if not _is_allowed(target.relative_to(folder.resolve()).as_posix(), kind):
            return f"a link to {target.name}, which stays"
    if _is_allowed(name, kind) and file.is_file():
        return None
    if not file.exists() or not (file.is_file() or file.is_dir()):
        return "no file"
    return next(
        (why for pattern, why in _REASONS if file.match(pattern)), "not on the list of what a model consists of"
    )


def _is_allowed(name: str, kind: Kind) -> bool:
    depth = name.count("/")
    return any(Path(name).match(pattern) and pattern.count("/") == depth for pattern in ALLOWED[kind])


def _read(file: Path, name: str) -> Sent:
    try:
        state = _state(file)
        if file.suffix in {".safetensors", ".gguf"}:
            return Sent(name, file, state=state)
        if state[1] > LARGEST_TEXT:
            raise ModelError(
                f"{file} has {state[1]:,} bytes, too many for what it should be. Take it out of the folder."
            )
        content = file.read_bytes()
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror or error}.") from error
    return Sent(name, content)


def _state(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _left_out(file: Path, name: str, reason: str) -> LeftOut:
    if file.is_symlink() or not file.is_dir():
        found = os.lstat(file)
        return LeftOut(name, found.st_size if stat.S_ISREG(found.st_mode) else 0, reason)
    sizes = list(_sizes(file))
    return LeftOut(f"{name}/ ({len(sizes)} files)", sum(sizes), reason)


def _sizes(folder: Path) -> Iterator[int]:
    for place, _, names in os.walk(folder):
        yield from (os.lstat(os.path.join(place, name)).st_size for name in names)


def _cleaned(file: Sent, base: str | None, base_model_id: str | None, revision: str | None) -> Sent:
    is_adapter = file.name == ADAPTER_CONFIG
    if isinstance(file.content, Path) or not (is_adapter or file.name in _WITH_PATHS):
        return file
    try:
        content = json.loads(file.content)
    except ValueError as error:
        raise ModelError(f"{file.name} is no JSON: {error}. Write the folder again.") from error
    changed: dict[str, str] = {}
    new = _replaced(content, base, base_model_id, changed)
    if is_adapter and isinstance(new, dict) and base_model_id:
        before = (new.get("base_model_name_or_path"), new.get("revision"))
        if before != (base_model_id, revision):
            changed.setdefault(str(before[0]), base_model_id)
            new |= {"base_model_name_or_path": base_model_id, "revision": revision}
    is_portable = True
    if file.name == tokenizer_files.CONFIG and isinstance(new, dict):
        is_portable = new == tokenizer_files.portable(new)
        new = tokenizer_files.portable(new)
    if not changed and is_portable:
        return file
    text = json.dumps(new, indent=2, ensure_ascii=False) + "\n"
    note = ", ".join(f"{old} becomes {short}" for old, short in changed.items())
    note = note or "as transformers 4 and 5 read it"
    return Sent(file.name, text.encode(), note)


def _replaced(content: Any, base: str | None, base_model_id: str | None, changed: dict[str, str]) -> Any:
    """`content` without paths of this machine; `changed` notes each."""
    if isinstance(content, Mapping):
        return {key: _replaced(value, base, base_model_id, changed) for key, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, base, base_model_id, changed) for value in content]
    if not isinstance(content, str):
        return content
    is_path = len(content) < 4096 and _LOCAL_PATH.fullmatch(content) is not None
    if base_model_id and base and content == base != base_model_id:
        changed[content] = base_model_id
    elif is_path:
        changed[content] = re.split(r"[/\\]", content.rstrip("/\\"))[-1]
    return changed.get(content, content)
