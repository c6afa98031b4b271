"""What makes two models give the same log-probs: weights and adapter by content, quantization, compute type."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_dpo.environment import cache_folder
from qlora_dpo.errors import StorageError
from qlora_dpo.models.weight_files import model_folder, weight_files
from qlora_dpo.reference.store import ModelIdentity

# Fields of config.json and adapter_config.json that change with the program or the place, and no log-prob.
_NOT_CONTENT = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "base_model_name_or_path", "revision",
    "inference_mode", "peft_version", "task_type", "lora_dropout", "init_lora_weights",
}  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WORTH_A_WORD = 4 * 2**30  # bytes whose hashing takes long enough to be told
_THREADS = 4  # hashing releases the interpreter


def reference_cache() -> Path:
    """Where stores lie by default, and the hashes of weights."""
    return cache_folder() / "reference"


def identity_of(content: Mapping[str, Any], words: Mapping[str, Any]) -> ModelIdentity:
    """The identity of what has this content; `words` are only there to be read."""
    text = json.dumps(dict(content), sort_keys=True)
    return ModelIdentity(hashlib.sha256(text.encode()).hexdigest(), {**words, **content})


def local_identity(
    name: str, *, commit: str | None, quantization: Mapping[str, Any] | None, dtype: str, adapter: Path | None,
    code: str | None = None,
) -> ModelIdentity:  # fmt: skip
    """The identity of a base in a folder or on the Hub, with a frozen adapter where it has one.

    Args:
        commit: of a Hub model.
        code: the commit of the Python code that came with the model.

    Raises:
        StorageError: its files cannot be read.
    """
    folder = model_folder(name, commit)
    content: dict[str, Any] = {
        "weights": combined(hashes(weight_files(folder))),
        "config": _json_content(folder / "config.json"),
        "quantization": dict(quantization) if quantization else None,
        "dtype": dtype,
        "adapter": None,
        "code": code,
    }
    words = {"model": str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name}
    if adapter is not None:
        weights = hashes([adapter / "adapter_model.safetensors"])
        content["adapter"] = combined([*weights, _json_content(adapter / "adapter_config.json")])
        words["adapter_folder"] = str(adapter.resolve())
    return identity_of(content, words)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The entries in which two descriptions differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def hashes(files: Sequence[Path]) -> list[str]:
    """The sha256 of each file. What was hashed before, or has its hash as its name on the Hub, is not read again.

    Raises:
        StorageError: a file cannot be read.
    """
    known = _known_hashes()
    try:
        stamps = {file: _stamp(file) for file in files}
        unknown = [file for file in files if known.get(str(file.resolve()), [None])[:-1] != stamps[file]]
        new = dict(zip(unknown, _hash_all(unknown), strict=True))
    except OSError as error:
        raise StorageError(f"{error.filename or files[0]} cannot be read: {error.strerror or error}.") from error
    known |= {str(file.resolve()): [*stamps[file], digest] for file, digest in new.items()}
    if new:
        _keep_hashes(known)
    return [known[str(file.resolve())][-1] for file in files]


def combined(parts: Sequence[str]) -> str:
    """One hash of several, in their order."""
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _hash_all(files: Sequence[Path]) -> list[str]:
    size = sum(file.stat().st_size for file in files if not _is_named_by_hash(file))
    if size > _WORTH_A_WORD:
        print(f"Hashing {size / 2**30:.0f} GiB of weights, once, to know this model again.", file=sys.stderr)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_hash, files))


def _hash(file: Path) -> str:
    if _is_named_by_hash(file):
        return file.resolve().name
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _is_named_by_hash(file: Path) -> bool:
    """In the Hub's cache a file of weights is a link to a blob whose name is its sha256."""
    blob = file.resolve()
    return blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) is not None


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _known_hashes() -> dict[str, list[Any]]:
    """Stamp and hash by path; a damaged file of them is as good as none."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        read = json.loads((reference_cache() / "hashes.json").read_text(encoding="utf-8"))
        return {path: entry for path, entry in read.items() if isinstance(entry, list) and entry}
    return {}


def _keep_hashes(known: Mapping[str, list[Any]]) -> None:
    """Remember what was hashed; without room for that it is hashed again next time."""
    file = reference_cache() / "hashes.json"
    staged = file.with_name(f".hashes.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(json.dumps(known, indent=1), encoding="utf-8")
        staged.replace(file)
    except OSError:
        with suppress(OSError):
            staged.unlink(missing_ok=True)


def _json_content(file: Path) -> str:
    """Hash of what a config says, without what changes from program to program."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        content = {name: value for name, value in read.items() if name not in _NOT_CONTENT}
    except (OSError, ValueError, AttributeError) as error:
        raise StorageError(f"{file} cannot be read ({error}). Download or restore it.") from error
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
