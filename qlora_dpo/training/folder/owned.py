"""What is the tool's own in a run folder: how one is recognized, and all names that the tool writes there.

`--fresh` deletes these names and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.training.records.seal import is_edited

CONFIG, STATUS, METRICS, CURVES, CARD, SAMPLES = (
    "config.yaml", "run.json", "metrics.jsonl", "training_curves.png", "README.md", "samples.jsonl"
)  # fmt: skip
NEW = "new"
"""The status of a run that holds its folder and has not begun to train."""
STATES = (NEW, "training", "finished")

_FILES = "|".join(
    [
        *map(re.escape, (CONFIG, STATUS, METRICS, CURVES, CARD, SAMPLES)), r"data\.json", r"before_after\.json",
        r"adapter_config\.json", r"adapter_model\.safetensors",
        r"merge_report\.json", r"release_check\.json", r"report\.html",
        # of a tokenizer, as transformers saves it
        r"tokenizer(_config)?\.json", r"special_tokens_map\.json", r"added_tokens\.json", r"chat_template\.jinja",
        r"vocab\.(json|txt)", r"merges\.txt", r"(tokenizer|spiece|sentencepiece\.bpe)\.model",
    ]
)  # fmt: skip
_STAGED = rf"\.({_FILES})\.\d+\.tmp|\.tmp\w{{6}}"  # what a kill leaves of this tool's files, and of safetensors'
_CHECKPOINT = (
    r"adapter_config\.json|adapter_model\.safetensors|optimizer\.pt|rng_state\.pt|trainer_state\.json|manifest\.json"
    r"|\.tmp\w{6}"
)
_ANY = r".*"

NAMES: dict[str, str | None] = {
    _FILES: None,
    _STAGED: None,
    r"(\.staging-)?checkpoint-\d+": _CHECKPOINT,
    r"pairs": r"\.?(train|held_out)\.jsonl(\.\d+\.tmp)?",
    r"compare(-checkpoint-\d+)?": (
        r"\.?(answers\.jsonl|summary\.json|gate\.json)(\.\d+\.tmp)?|verdicts\.jsonl|calls\.sqlite(-wal|-shm)?"
    ),
    r"additional_chat_templates": r"\w+\.jinja",
    r"tensorboard|wandb": _ANY,
}
"""Patterns of names in a run folder; for folders with the pattern of the names in them."""


def read_status(path: Path) -> dict[str, Any]:
    """Content of run.json; empty where there is none that can be read."""
    try:
        status = json.loads((path / STATUS).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def is_run(path: Path) -> bool:
    """Whether a folder is a run of this tool: its run.json says so. The first ones had no id but a number of steps."""
    status = read_status(path)
    is_marked = isinstance(status.get("run_id"), str) or isinstance(status.get("total_steps"), int)
    return is_marked and status.get("status") in STATES


def is_own_name(name: str) -> bool:
    """Whether the tool writes this name into a run folder."""
    return any(re.fullmatch(pattern, name) for pattern in NAMES)


def is_staged(name: str) -> bool:
    """Whether a kill has left this file of one that was being written."""
    return re.fullmatch(_STAGED, name) is not None


def refuse_links(path: Path) -> None:
    """Refuse a run folder in which a name of the tool's is a link, through which it would write elsewhere.

    Raises:
        StorageError: naming the first.
    """
    for child in sorted(path.iterdir()):
        if child.is_symlink() and is_own_name(child.name):
            raise StorageError(f"{child} is a link, which is not written through. Put the file itself there.")


def refuse_to_empty(path: Path) -> None:
    """Refuse --fresh where a slip would cost more than a run.

    Raises:
        UsageError: saying what the folder is.
    """
    place = path.resolve()
    what = {
        "a link": path.is_symlink(),
        "a home folder": place == Path.home().resolve() or place in Path.home().resolve().parents,
        "the root of a repository": (place / ".git").exists(),
        "the root of a disk": os.path.ismount(place),
    }
    for words, holds in what.items():
        if holds:
            raise UsageError(
                f"--output_dir {path} is {words}, where --fresh deletes nothing. Name a new folder, or delete by hand."
            )


def empty(path: Path) -> None:
    """Delete what the tool wrote in a run folder, but for the two files that are replaced: run.json and config.yaml.

    A card that somebody wrote or edited stays, and so does every folder that holds anything else.

    Raises:
        OSError: something cannot be deleted.
    """
    for child, inside in _named(path):
        if inside is None:
            child.unlink()
        elif inside == _ANY:
            shutil.rmtree(child)
        else:
            _remove(child, inside)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, whole or half written, where there is one; a file in it that is not of one stays.

    Raises:
        OSError: it cannot be deleted.
    """
    if folder.is_dir() and not folder.is_symlink():
        _remove(folder, _CHECKPOINT)


def _remove(folder: Path, names: str) -> None:
    """Delete the files with these names, and the folder unless it holds something else."""
    for file in folder.iterdir():
        if re.fullmatch(names, file.name) and (file.is_symlink() or file.is_file()):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _named(path: Path) -> Iterator[tuple[Path, str | None]]:
    """The tool's own files and folders, these with the pattern of what is in them."""
    for child in sorted(path.iterdir()):
        for pattern, inside in NAMES.items():
            is_file = child.is_symlink() or child.is_file()
            if re.fullmatch(pattern, child.name) and child.name not in (CONFIG, STATUS) and is_file == (inside is None):
                if child.name != CARD or not is_edited(child):
                    yield child, inside
