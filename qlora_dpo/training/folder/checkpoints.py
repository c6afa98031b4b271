"""Atomic checkpoints: staged, hashed, synced, renamed; and finding the newest one that is whole.

checkpoint-N/
  adapter_model.safetensors, adapter_config.json   loadable by any PEFT program
  optimizer.pt, rng_state.pt                       tensors and plain values only (loaded with weights_only)
  trainer_state.json                               step, schedule, kind of optimizer
  manifest.json                                    size and sha256 of each of the above and of itself, hash of the
                                                   options, versions; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from qlora_dpo.environment import versions
from qlora_dpo.training.folder.owned import is_staged, remove_checkpoint

MANIFEST = "manifest.json"
FILES = {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "rng_state.pt", "trainer_state.json"}
STAGING = ".staging-checkpoint-"
SAFE = 2  # valid checkpoints that are never deleted


def rng_states() -> dict[str, Any]:
    """Every random state that a step can draw from, as tensors and plain values."""
    version, keys, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    name, numpy_keys, position, has_gauss, cached = legacy
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # of this process's GPU
        "python": [version, list(keys), gauss],
        "numpy": [name, numpy_keys.tolist(), position, has_gauss, cached],
    }


def restore_rng_states(states: dict[str, Any]) -> None:
    """Undo everything that drew random numbers since `rng_states()`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def save_checkpoint(
    run: Path, step: int, *, save_adapter: Callable[[Path], None], optimizer: dict[str, Any], rng: dict[str, Any],
    state: dict[str, Any], options_hash: str,
) -> Path:  # fmt: skip
    """Write checkpoint-`step` so that it either exists whole or not at all.

    Raises:
        OSError: the disk refuses; the older checkpoints are as they were.
    """
    final = run / f"checkpoint-{step}"
    staging = run / f"{STAGING}{step}"
    remove_checkpoint(staging)
    try:
        staging.mkdir()
        with disk_errors():
            save_adapter(staging)
            _save_tensors(optimizer, staging / "optimizer.pt")
            _save_tensors(rng, staging / "rng_state.pt")
        (staging / "trainer_state.json").write_text(json.dumps(state | {"step": step}, indent=2) + "\n")
        _seal(staging, {"step": step, "config": options_hash, "versions": versions()})
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)  # half a checkpoint only takes room
        raise
    remove_checkpoint(final)
    staging.rename(final)
    sync(run)
    return final


def rotate(run: Path, keep: int) -> None:
    """Delete old checkpoints. The newest `keep` stay, the first of which has just been written, and where not two of
    them are valid, older ones too.

    Raises:
        OSError: one cannot be deleted.
    """
    newest_first = [folder for _, folder in reversed(checkpoints(run))]
    if len(newest_first) <= keep:
        return
    valid = 1
    for place, folder in enumerate(newest_first[1:], start=1):
        if valid < SAFE and _damage(folder) is None:
            valid += 1
        elif valid >= SAFE and place >= keep:
            remove_checkpoint(folder)


def clear_leftovers(run: Path) -> None:
    """Delete what a killed process left half-written."""
    for child in run.glob(".*"):
        with suppress(OSError):
            if re.fullmatch(rf"{re.escape(STAGING)}\d+", child.name):
                remove_checkpoint(child)
            elif is_staged(child.name):
                child.unlink()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Within this block a failed write is an OSError also where safetensors and torch raise errors of their own."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    except RuntimeError as error:  # torch's zip writer complains about its position after the write itself failed
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first, whole or not."""
    numbered = [(path.name.removeprefix("checkpoint-"), path) for path in run.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(number), path) for number, path in numbered if number.isdigit())


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one was rejected."""
    rejected: list[str] = []
    for _, folder in reversed(checkpoints(run)):
        reason = _damage(folder)
        if reason is None:
            return folder, rejected
        rejected.append(f"{folder.name} is not used: {reason}.")
    return None, rejected


def load_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(optimizer state, random states, trainer state) of a verified checkpoint; no pickle is executed."""
    optimizer = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    rng = torch.load(checkpoint / "rng_state.pt", map_location="cpu", weights_only=True)
    return optimizer, rng, json.loads((checkpoint / "trainer_state.json").read_text())


def other_versions(checkpoint: Path) -> list[str]:
    """`torch 2.10 (now 2.11)` for each version that has changed since the checkpoint was written."""
    then = (read_manifest(checkpoint) or {}).get("versions", {})
    return [f"{name} {then[name]} (now {now})" for name, now in versions().items() if then.get(name, now) != now]


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest, or None where there is none that can be believed."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        is_whole = manifest.pop("sha256") == _digest(manifest) and FILES <= manifest["files"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if is_whole else None


def _save_tensors(content: dict[str, Any], file: Path) -> None:
    with file.open("wb") as opened:  # given a path torch would write by itself and lose the system's reason
        torch.save(content, opened)


def _seal(staging: Path, facts: dict[str, Any]) -> None:
    """Write the manifest and bring all files to the disk."""
    files = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(staging.iterdir())}
    manifest = facts | {"files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=2) + "\n")
    for path in staging.iterdir():
        sync(path)
    sync(staging)


def _damage(folder: Path) -> str | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        try:
            if _sha256(path) != expected["sha256"]:
                return f"the content of {name} has changed"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
