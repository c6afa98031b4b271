"""When and how a run writes its checkpoints, how much room they need, and what happens while the disk refuses them."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from qlora_dpo.errors import StorageError
from qlora_dpo.models.lora import save_adapter, trainable_parameters
from qlora_dpo.training.folder.checkpoints import checkpoints, rng_states, rotate, save_checkpoint
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.parallel.ranks import ALONE, Ranks
from qlora_dpo.training.parallel.sharding import whole_adapter
from qlora_dpo.training.schedule import Schedule

PATIENCE_SECONDS = 30 * 60  # that a run goes on although its checkpoints cannot be written
RETRY_SECONDS = 60


@dataclass
class Content:
    """What a checkpoint is made of; `weights` are given where those of the model are sharded."""

    optimizer: dict[str, Any]
    rng: dict[str, Any]
    weights: dict[str, Any] | None = None


@dataclass
class Saver:
    """Writes the checkpoints of a run. A disk that refuses them has half an hour to be emptied.

    All processes of a run call it together; the first one decides and writes.
    """

    run: RunFolder
    model: Any
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    schedule: Schedule
    steps: int
    """Between two checkpoints."""
    minutes: float
    """After which a checkpoint is written also between; 0 for never."""
    keep: int
    newest: int | None = None
    """Step of the newest checkpoint that is whole."""
    more_state: Callable[[], dict[str, Any]] = dict
    """What else a checkpoint's trainer_state.json holds."""
    ranks: Ranks = ALONE
    clock: Callable[[], float] = time.monotonic
    _failing_since: float | None = None
    _tried_at: float = 0.0
    _saved_at: float = 0.0

    def begin(self) -> None:
        """Check the room, and in a new run write checkpoint-0, so that what cannot be written fails now and not after
        the first hours.

        Raises:
            StorageError: there is too little room, or the disk refuses.
        """
        self._saved_at = self.clock()
        self.ranks.on_main(self._check_room)
        if self.newest is None:
            self.save_now(0, rng_states())

    def is_due(self, number: int) -> bool:
        """Whether a checkpoint is to be written after this step: by steps, by the clock, or once more."""
        return self.ranks.on_main(lambda: self._is_due(number))

    def _is_due(self, number: int) -> bool:
        if number % self.steps == 0:
            return True
        if self._failing_since is not None:
            return self.clock() - self._tried_at >= RETRY_SECONDS
        return 0 < 60 * self.minutes <= self.clock() - self._saved_at

    def save(self, number: int, rng: dict[str, Any]) -> None:
        """Write checkpoint-`number`; where the disk refuses, say so, and the run goes on.

        Raises:
            StorageError: the disk has refused for half an hour.
        """
        content = self._content(rng)
        self.newest = self.ranks.on_main(lambda: self._try(number, content))

    def _try(self, number: int, content: Content) -> int | None:
        self._tried_at = self.clock()
        try:
            self._write(number, content)
        except OSError as error:
            self._bear(number, error)
        else:
            if self._failing_since is not None:
                tqdm.write(f"checkpoint-{number} is written; checkpoints can be written again.", file=sys.stderr)
            self._failing_since = None
        return self.newest

    def save_now(self, number: int, rng: dict[str, Any]) -> None:
        """Write checkpoint-`number` before the run ends, unless it is there already.

        Raises:
            StorageError: the disk refuses.
        """
        if number == self.newest:
            return
        content = self._content(rng)
        self.newest = self.ranks.on_main(lambda: self._insist(number, content))

    def _insist(self, number: int, content: Content) -> int | None:
        try:
            self._write(number, content)
        except OSError as error:
            raise StorageError(
                f"checkpoint-{number} cannot be written: {error.strerror or error}. {self._last_safe()}"
            ) from error
        return self.newest

    def _content(self, rng: dict[str, Any]) -> Content:
        """What the checkpoint of now holds, brought together from all processes."""
        own, *others = self.ranks.gather(rng)
        states = own | ({"others": others} if others else {})
        moments: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
        }  # fmt: skip
        if not self.ranks.shards_adapter:
            return Content(moments, states)
        from qlora_dpo.training.parallel.fsdp import whole

        return Content(whole(moments), states, whole_adapter(self.model, self.ranks))

    def _write(self, number: int, content: Content) -> None:
        save_checkpoint(
            self.run.path,
            number,
            save_adapter=lambda folder: save_adapter(self.model, folder, content.weights),
            optimizer=content.optimizer,
            rng=content.rng,
            state={
                "total_steps": self.schedule.total_steps,
                "epoch": self.schedule.epoch(number),
                "optimizer": type(self.optimizer).__name__,
            }
            | self.more_state(),
            options_hash=self.run.options_hash,
        )
        self.newest = number
        self._saved_at = self.clock()
        try:
            rotate(self.run.path, self.keep)
            self.run.update_status(status="training", step=number)
        except (OSError, StorageError) as error:  # the checkpoint is what counts
            tqdm.write(f"warning: {error}", file=sys.stderr)

    def _check_room(self) -> None:
        size = checkpoint_bytes(self.model, self.optimizer)
        count = max(1, self.keep + 1 - len(checkpoints(self.run.path)))  # one more than stays, while it is written
        free = shutil.disk_usage(self.run.path).free
        if free < count * size:
            what = f"{count} checkpoints of {_size(size)} each need" if count > 1 else "a checkpoint needs"
            raise StorageError(
                f"{self.run.path} has {_size(free)} free, and {what} {_size(count * size)}: make room there, or name "
                "another --output_dir."
            )

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


def checkpoint_bytes(model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Size of a checkpoint once the optimizer has its two moments per weight, of 8 bit or as wide as the weight."""
    parameters = trainable_parameters(model)
    adapter = sum(parameter.nbytes for parameter in parameters)
    is_8bit = getattr(getattr(optimizer, "args", None), "optim_bits", 32) == 8  # bitsandbytes
    return adapter + 2 * (sum(parameter.numel() for parameter in parameters) if is_8bit else adapter)


def _size(count: float) -> str:
    unit = "GiB" if count >= 2**30 else "MiB"
    return f"{count / (2**30 if unit == 'GiB' else 2**20):.1f} {unit}"
