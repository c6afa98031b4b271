"""The folder of one run: what is in it, whether it may be continued, and what was asked for."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_dpo.errors import StorageError, UsageError

CONFIG, STATUS, METRICS, CURVES, CARD, SAMPLES = (
    "config.yaml", "run.json", "metrics.jsonl", "training_curves.png", "README.md", "samples.jsonl"
)  # fmt: skip

# Options that may differ when a run continues: they change where it reports, not what it computes.
FREE_TO_CHANGE = {
    "output_dir", "fresh", "report_to", "run_name", "logging_steps", "eval_steps", "save_steps", "save_total_limit",
    "sample_generate", "max_new_tokens", "max_tokens_per_microbatch", "activation_checkpointing",
}  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths and status of a run."""

    path: Path

    @property
    def metrics(self) -> Path:
        """One JSON object per line: the record of the run."""
        return self.path / METRICS

    @property
    def is_finished(self) -> bool:
        """All steps were done and the adapter written."""
        return self.status().get("status") == "finished"

    def status(self) -> dict[str, Any]:
        """Content of run.json; empty before the run has written it."""
        try:
            status: dict[str, Any] = json.loads((self.path / STATUS).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return status

    def update_status(self, **values: Any) -> None:
        """Merge `values` into run.json, atomically.

        Raises:
            StorageError: the disk refuses; the file is as it was.
        """
        file = self.path / STATUS
        try:
            write_atomically(file, json.dumps(self.status() | values, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(
                f"{file} cannot be written: {error.strerror or error}. Make room there and run the same command again."
            ) from error


def default_output_dir(model: str, dataset: str) -> Path:
    """runs/MODEL-DATASET, so that the same command finds its run again."""
    return Path("runs") / f"{Path(model).name}-{Path(dataset).name.split('.')[0]}"


def open_run_folder(path: Path, options: dict[str, Any], *, fresh: bool) -> RunFolder:
    """Create the run's folder, or reopen it to continue.

    Raises:
        StorageError: the folder cannot be written.
        UsageError: it holds something else, or a run with other options.
    """
    config_file = path / CONFIG
    is_run = config_file.is_file()
    if path.exists() and not path.is_dir():
        raise StorageError(f"--output_dir {path} is a file. Name a folder.")
    if path.is_dir() and not is_run and any(path.iterdir()):
        raise UsageError(f"--output_dir {path} holds files but no run of this tool. Name an empty or new folder.")
    try:
        if fresh and is_run:
            shutil.rmtree(path)
        elif (path / STATUS).is_file():  # training has begun: before that, options may still be corrected
            _refuse_changed(path, yaml.safe_load(config_file.read_text(encoding="utf-8")) or {}, options)
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write", str(path))
        write_atomically(config_file, yaml.safe_dump(options, sort_keys=False, allow_unicode=True))
    except OSError as error:
        raise StorageError(
            f"--output_dir {path} cannot be written: {error.strerror or error}. Name a folder that you may write to."
        ) from error
    return RunFolder(path)


def _refuse_changed(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"  {name}: was {before.get(name)}, now {now.get(name)}"
        for name in sorted(before.keys() | now.keys())
        if name not in FREE_TO_CHANGE and before.get(name) != now.get(name)
    ]
    if changed:
        raise UsageError(
            f"{path} holds a run with other options:\n" + "\n".join(changed) + "\nContinue it with its own options, "
            "name another --output_dir, or start anew with --fresh."
        )


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that a reader, or a kill, sees the old or the new content, never half of it."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
