"""The record of a run (metrics.jsonl) and its mirrors, which may fail without the run noticing."""

from __future__ import annotations

import json
import logging
import netrc
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.training.run_folder import write_atomically

logger = logging.getLogger(__name__)
Metrics = dict[str, float]


class Tracker(Protocol):
    """A mirror of the metrics."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Mirror one line of metrics.jsonl."""

    def finish(self) -> None:
        """Flush and close."""


class Recorder:
    """Appends to metrics.jsonl, then tells the mirrors; a mirror that fails is dropped with one warning.

    Lines that a full disk refuses are kept and written with the next one that it takes.
    """

    def __init__(self, file: Path, trackers: Sequence[Tracker]) -> None:
        self._file = file
        self._trackers = list(trackers)
        self._unwritten = ""
        self._disk_failed = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line; every mirror gets the same numbers."""
        self._unwritten += json.dumps({"step": step} | metrics) + "\n"
        self._write()
        self._tell(lambda tracker: tracker.log(step, metrics))

    def finish(self) -> None:
        """Try once more to write what the disk refused, and close the mirrors."""
        self._write()
        if self._unwritten:
            logger.warning("%s lacks its last %d lines.", self._file, self._unwritten.count("\n"))
        self._tell(lambda tracker: tracker.finish())

    def _write(self) -> None:
        try:
            _append(self._file, self._unwritten)
            self._unwritten, self._disk_failed = "", False
        except OSError as error:
            if not self._disk_failed:
                logger.warning(
                    "%s cannot be written (%s); its lines are kept until it can.", self._file, error.strerror or error
                )
            self._disk_failed = True

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # a mirror's own failure, of whatever kind, must not stop a run
                self._trackers.remove(tracker)
                logger.warning(
                    "%s failed (%s) and is no longer told; metrics.jsonl has it all.",
                    type(tracker).__name__,
                    error,
                )


def _append(file: Path, text: str) -> None:
    """Append all of `text` or, where the disk refuses, nothing: half a line would hide all later ones from a reader."""
    size = file.stat().st_size if file.exists() else 0
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(text)
    except OSError:
        with suppress(OSError):
            os.truncate(file, size)
        raise


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl; a torn last line is left out."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_back(file: Path, step: int) -> None:
    """Forget what was logged after `step`, so that a continued run writes each step once.

    Raises:
        StorageError: the disk refuses; the file is as it was.
    """
    kept = [json.dumps(row) for row in read_metrics(file) if row["step"] <= step]
    try:
        write_atomically(file, "".join(line + "\n" for line in kept))
    except OSError as error:
        raise StorageError(
            f"{file} cannot be written: {error.strerror or error}. Make room there and run the same command again."
        ) from error


def start_trackers(names: Sequence[str], folder: Path, run_name: str, options: dict[str, Any]) -> list[Tracker]:
    """Start the mirrors named in --report_to.

    Raises:
        UsageError: a mirror whose package is not installed.
    """
    trackers: list[Tracker] = []
    for name in names:
        if name == "none":
            continue
        try:
            trackers.append(TRACKERS[name](folder, run_name, options))
        except ImportError as error:
            raise UsageError(f"--report_to {name} needs the package {name}: pip install {name}.") from error
        except Exception as error:  # offline, not logged in, no disk: the run goes on without this mirror
            logger.warning("%s could not be started (%s); the run goes on without it.", name, error)
    return trackers


class WandbTracker:
    """Weights & Biases; offline unless logged in. Code, git state and console are not sent."""

    def __init__(self, folder: Path, run_name: str, options: dict[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _wandb_login() else "offline")
        settings = wandb.Settings(disable_git=True, disable_code=True, console="off")
        project = os.environ.get("WANDB_PROJECT", "qlora_dpo")
        self._run = wandb.init(
            project=project, name=run_name, dir=str(folder), config=options, mode=mode, settings=settings
        )

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in the run folder."""

    def __init__(self, folder: Path, run_name: str, options: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("options", json.dumps(options, indent=2, default=str))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
