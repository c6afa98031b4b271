"""The record of a run: metrics.jsonl, which the trackers mirror."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora_dpo.errors import StorageError
from qlora_dpo.training.folder.run_folder import write_atomically
from qlora_dpo.training.records.mirrors import Metrics, Mirror, Samples, finish_mirrors

logger = logging.getLogger(__name__)


class Recorder:
    """Appends to metrics.jsonl, then tells the mirrors, which never raise and never make it wait.

    Lines that a full disk refuses are kept and written with the next one that it takes.
    """

    def __init__(self, file: Path, mirrors: Sequence[Mirror]) -> None:
        self._file = file
        self._mirrors = mirrors
        self._unwritten = ""
        self._disk_failed = False

    def __enter__(self) -> None:
        """Within the block the run is recorded; however it ends, the mirrors get to know all of it."""

    def __exit__(self, *_error: object) -> None:
        self.finish()

    def log(self, step: int, metrics: Metrics) -> None:
        """Write one line; every mirror gets the same numbers."""
        self._unwritten += json.dumps({"step": step} | metrics) + "\n"
        self._write()
        for mirror in self._mirrors:
            mirror.log(step, metrics)

    def show_samples(self, step: int, samples: Samples) -> None:
        """Tell the mirrors what samples.jsonl got."""
        for mirror in self._mirrors:
            mirror.show_samples(step, samples)

    def finish(self) -> None:
        """Try once more to write what the disk refused, and close the mirrors, waiting a few seconds at most."""
        self._write()
        if self._unwritten:
            logger.warning("%s lacks its last %d lines.", self._file, self._unwritten.count("\n"))
        finish_mirrors(self._mirrors)

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
