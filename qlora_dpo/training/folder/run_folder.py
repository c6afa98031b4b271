"""The folder of one run: what is in it, whether it may be continued, and what was asked for."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.files.atomic import write_whole
from qlora_dpo.training.folder.changes import (
    CONTENT,
    ONE_TIME,
    Change,
    changed_content,
    changed_options,
    options_hash,
    record,
    refuse,
    refuse_pointless,
)
from qlora_dpo.training.folder.owned import (
    CARD,
    CONFIG,
    CURVES,
    METRICS,
    NEW,
    SAMPLES,
    STATUS,
    empty,
    is_run,
    is_staged,
    read_status,
    refuse_links,
    refuse_to_empty,
)
from qlora_dpo.training.folder.run_lock import LOCK, locked

__all__ = [
    "CARD", "CONFIG", "CURVES", "METRICS", "SAMPLES", "STATUS", "RunFolder", "default_output_dir", "held_run_folder",
    "open_run_folder", "write_atomically",
]  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Paths and status of a run and, where it is to be trained, what was asked for."""

    path: Path
    options: dict[str, Any] = field(default_factory=dict)
    allow_changed: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    """Allowed differences between `options` and those that the run began with."""
    content: dict[str, str] = field(default_factory=dict)
    """Fingerprints of what the options name, by option."""

    @property
    def metrics(self) -> Path:
        """One JSON object per line: the record of the run."""
        return self.path / METRICS

    @property
    def is_finished(self) -> bool:
        """All steps were done and the adapter written."""
        return self.status().get("status") == "finished"

    @property
    def has_nothing_to_do(self) -> bool:
        """It is finished, and nothing was allowed to change since."""
        return self.is_finished and not self.changes

    def refuse_fewer_steps(self, total_steps: int) -> None:
        """Refuse to end where a finished run has been, or before.

        Raises:
            UsageError: with both numbers of steps.
        """
        done = int(self.status().get("step", 0))
        if self.is_finished and total_steps <= done:
            raise UsageError(
                f"{self.path} holds a run that has finished its {done} steps, and these options ask for {total_steps}: "
                "nothing is left to train. Ask for more (--max_steps, --num_train_epochs), name another --output_dir, "
                "or start anew with --fresh."
            )

    @property
    def options_hash(self) -> str:
        """Hash of the options that decide what the run computes."""
        return options_hash(self.options)

    def status(self) -> dict[str, Any]:
        """Content of run.json; empty where there is none."""
        return read_status(self.path)

    def chat_template_date(self) -> str | None:
        """The day that the run's chat template writes, where it writes one."""
        date: str | None = self.status().get("chat_template_date")
        return date

    def update_status(self, **values: Any) -> None:
        """Merge `values` into run.json, atomically.

        Raises:
            StorageError: the disk refuses; the file is as it was.
        """
        self._write(STATUS, json.dumps(self.status() | values, indent=2, ensure_ascii=False) + "\n")

    def with_content(self, content: dict[str, str]) -> RunFolder:
        """The run with the fingerprints of what its options name.

        Raises:
            UsageError: they are not those that the run began with, and nobody allowed it; or what was allowed has not
                changed.
        """
        status = self.status()
        other = changed_content(status.get("content", {}), content, self.changes, self.allow_changed)
        refuse(self.path, other, self.allow_changed)
        changes = (*self.changes, *other)
        refuse_pointless(self.path, changes, self.allow_changed, status.get("changed", []))
        return replace(self, content=content, changes=changes)

    def begin(self, **values: Any) -> str:
        """Note in the folder that training begins, or goes on, with these options; returns the run's id for trackers.

        Raises:
            StorageError: the disk refuses.
        """
        status = self.status()
        run_id = status.get("run_id") or secrets.token_hex(8)
        changed = record(status.get("changed", []), self.changes, status.get("step", 0))
        self.update_status(status="training", run_id=run_id, content=self.content, changed=changed, **values)
        self._write(CONFIG, _config_text(self.options))
        return str(run_id)

    def _write(self, name: str, text: str) -> None:
        file = self.path / name
        try:
            write_atomically(file, text)
        except OSError as error:
            raise StorageError(
                f"{file} cannot be written: {error.strerror or error}. Make room there and run the same command again."
            ) from error


def default_output_dir(model: str, dataset: str) -> Path:
    """runs/MODEL-DATASET, so that the same command finds its run again."""
    return Path("runs") / f"{Path(model).name}-{Path(dataset).name.split('.')[0]}"


@contextmanager
def held_run_folder(
    path: Path, options: dict[str, Any], *, fresh: bool, allow_changed: Sequence[str] = ()
) -> Iterator[RunFolder]:
    """Create or reopen the run's folder, for this process alone until the block ends.

    Raises:
        StorageError: it cannot be written, or another process trains there.
        UsageError: it holds something else, or a run with other options.
    """
    _refuse_foreign(path, fresh)
    with ExitStack() as stack:
        with _storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(path))
        yield open_run_folder(path, options, fresh=fresh, allow_changed=allow_changed)


def open_run_folder(
    path: Path, options: dict[str, Any], *, fresh: bool, allow_changed: Sequence[str] = ()
) -> RunFolder:
    """Create the run's folder, or reopen it to continue, whether or not another process is there.

    Raises:
        StorageError: the folder cannot be written.
        UsageError: it holds something else, or a run with other options.
    """
    _refuse_foreign(path, fresh)
    allowed = tuple(allow_changed)
    run = RunFolder(path, options, allowed)
    has_begun = run.status().get("status", NEW) != NEW and not fresh  # before that, options may still be corrected
    if has_begun:
        changes = changed_options(_read_config(path / CONFIG), options)
        refuse(path, changes, allowed, is_finished=run.is_finished)
        named = [name for name in allowed if name not in CONTENT]  # about content the data have the last word
        refuse_pointless(path, changes, named, run.status().get("changed", []))
        run = replace(run, changes=tuple(changes))
    elif allowed:
        raise UsageError(
            f"--allow_changed {' '.join(allowed)}: no run has begun in {path} that could differ. Leave it out."
        )
    with _storage_errors(path):
        if fresh and path.is_dir():
            empty(path)
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write", str(path))
        if not has_begun:
            if fresh or not is_run(path):  # first what marks the folder as a run; last, should --fresh be cut short
                marks = {"status": NEW, "run_id": secrets.token_hex(8)}
                write_atomically(path / STATUS, json.dumps(marks, indent=2) + "\n")
            write_atomically(path / CONFIG, _config_text(options))
    return run


def _refuse_foreign(path: Path, fresh: bool) -> None:
    """Refuse a path that is a file, a folder of something else, or one that --fresh should not empty."""
    if path.exists() and not path.is_dir():
        raise StorageError(f"--output_dir {path} is a file. Name a folder.")
    if not path.is_dir():
        return
    with _storage_errors(path):
        if is_run(path):
            refuse_links(path)
            if fresh:
                refuse_to_empty(path)
        elif any(child.name != LOCK and not is_staged(child.name) for child in path.iterdir()):
            raise UsageError(
                f"--output_dir {path} holds files but no run of this tool, which its {STATUS} would say. Name an empty "
                "or new folder."
            )


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"--output_dir {path} cannot be written: {error.strerror or error}. Name a folder that you may write to."
        ) from error


def _read_config(file: Path) -> dict[str, Any]:
    try:
        options: dict[str, Any] = dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise StorageError(
            f"{file} cannot be read ({type(error).__name__}), so nobody knows what this run began with. Restore it, or "
            "start anew with --fresh."
        ) from error
    return options


def _config_text(options: dict[str, Any]) -> str:
    settings = {name: value for name, value in options.items() if name not in ONE_TIME}
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def write_atomically(path: Path, text: str) -> None:
    """`write_whole` for a text."""
    write_whole(path, text.encode())
