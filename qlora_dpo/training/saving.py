"""When and how a run writes its checkpoints, and what it does while the disk refuses them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from qlora_dpo.errors import StorageError
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.training.checkpoints import save_checkpoint
from qlora_dpo.training.run_folder import RunFolder
from qlora_dpo.training.schedule import Schedule

PATIENCE_SECONDS = 30 * 60  # that a run goes on although its checkpoints cannot be written
RETRY_SECONDS = 60


@dataclass
class Saver:
    """Writes the checkpoints of a run. A disk that refuses them has half an hour to be emptied."""

    run: RunFolder
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    schedule: Schedule
    keep: int
    newest: int | None = None
    """Step of the newest checkpoint that is whole."""
    clock: Callable[[], float] = time.monotonic
    _failing_since: float | None = None
    _tried_at: float = 0.0

    @property
    def has_to_retry(self) -> bool:
        """The last attempt failed, a minute ago or longer."""
        return self._failing_since is not None and self.clock() - self._tried_at >= RETRY_SECONDS

    def save(self, number: int, rng: dict[str, Any]) -> None:
        """Write checkpoint-`number`; where the disk refuses, say so, and the run goes on.

        Raises:
            StorageError: the disk has refused for half an hour.
        """
        self._tried_at = self.clock()
        try:
            self._write(number, rng)
        except OSError as error:
            self._bear(number, error)
        else:
            if self._failing_since is not None:
                tqdm.write(f"checkpoint-{number} is written; checkpoints can be written again.", file=sys.stderr)
            self._failing_since = None

    def save_now(self, number: int, rng: dict[str, Any]) -> None:
        """Write checkpoint-`number` before the run ends, unless it is there already.

        Raises:
            StorageError: the disk refuses.
        """
        if number == self.newest:
            return
        try:
            self._write(number, rng)
        except OSError as error:
            raise StorageError(
                f"checkpoint-{number} cannot be written: {error.strerror or error}. {self._last_safe()}"
            ) from error

    def _write(self, number: int, rng: dict[str, Any]) -> None:
        save_checkpoint(
            self.run.path,
            number,
            save_adapter=lambda folder: save_adapter(self.model, folder),
            optimizer={"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()},
            rng=rng,
            state={"total_steps": self.schedule.total_steps, "epoch": self.schedule.epoch(number)},
            keep=self.keep,
        )
        self.newest = number
        try:
            self.run.update_status(status="training", step=number)
        except StorageError as error:  # the checkpoint is what counts
            tqdm.write(f"warning: {error}", file=sys.stderr)

    def _bear(self, number: int, error: OSError) -> None:
        reason = error.strerror or str(error)
        if self._failing_since is None:
            self._failing_since = self._tried_at
            tqdm.write(
                f"warning: checkpoint-{number} cannot be written ({reason}). The run goes on and tries again every "
                f"minute. {self._last_safe()}",
                file=sys.stderr,
            )
        elif self._tried_at - self._failing_since >= PATIENCE_SECONDS:
            minutes = (self._tried_at - self._failing_since) / 60
            raise StorageError(
                f"no checkpoint could be written for {minutes:.0f} minutes: {reason}. {self._last_safe()}"
            ) from error

    def _last_safe(self) -> str:
        if self.newest is None:
            return f"No checkpoint has been written yet: make room in {self.run.path}; the same command starts again."
        return f"checkpoint-{self.newest} is safe: make room in {self.run.path}; the same command continues from it."
