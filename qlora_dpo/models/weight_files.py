"""Where the weights of a model lie on this disk."""

from __future__ import annotations

import json
from pathlib import Path

from qlora_dpo.errors import StorageError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")  # run code when they are loaded; only safetensors are


def model_folder(name: str, commit: str | None) -> Path:
    """The folder of a model, for one on the Hub its snapshot in the cache.

    Raises:
        StorageError: its files are not in the cache.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(name, "config.json", revision=commit)
    except (OSError, ValueError) as error:
        raise StorageError(f"{name}: its files are not in the Hub's cache ({error}).") from error
    return Path(str(file)).parent


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in a model folder: what config.json names, else a single file, else
    those of the index; else all there are, as for an adapter.

    Raises:
        StorageError: there are none, or their index cannot be read.
    """
    single, index = folder / _named(folder), folder / "model.safetensors.index.json"
    if single.suffix == ".json":
        index = single
    elif single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{index} cannot be read ({error}). Download or restore it.") from error
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f" ({others[0]} is a pickle, which is not loaded: it can run code)" if others else ""
        raise StorageError(f"{folder} holds no *.safetensors weights{found}. Download or convert them.")
    return files


def _named(folder: Path) -> str:
    """The file that config.json names; it may be an index."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(config.get("transformers_weights") or "model.safetensors")
    except (OSError, ValueError, AttributeError):
        return "model.safetensors"
