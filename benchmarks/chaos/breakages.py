"""Promises broken on purpose (`--break NAME`): the row that holds the promise must then fail.

Each replaces one function of the tool in the process of the run, wherever it has been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_everywhere(original: Any, substitute: Any) -> None:
    """Put `substitute` in the place of a function in every module of the tool that has imported it."""
    for name, module in list(sys.modules.items()):
        if name == "qlora_dpo" or name.startswith("qlora_dpo."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, substitute)


def no_verification() -> None:
    """Continue from the checkpoint with the highest number, whole or not."""
    from qlora_dpo.training.folder import checkpoints

    def newest(run: Path) -> tuple[Path | None, list[str]]:
        found = checkpoints.checkpoints(run)
        return (found[-1][1] if found else None), []

    replace_everywhere(checkpoints.newest_valid, newest)


def no_random_states() -> None:
    """Continue with whatever the random generators hold, so that dropout differs."""
    from qlora_dpo.training.folder import checkpoints

    replace_everywhere(checkpoints.restore_rng_states, lambda states: None)


def saves_in_place() -> None:
    """Write a checkpoint under its own name, as if a crash could not fall into it, and trust it."""
    no_verification()
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self.name.startswith(".staging-"):
            target.mkdir()
            for file in sorted(self.iterdir()):
                rename(file, target / file.name)
            self.rmdir()
            return target
        return rename(self, target)

    Path.rename = late  # type: ignore[method-assign, assignment]


def deaf() -> None:
    """Hear no signal until the run is over."""
    from qlora_dpo.training.signals import StopFlag

    StopFlag.check = lambda self: None  # type: ignore[method-assign]


def dies_without_room() -> None:
    """Let a checkpoint that cannot be written end the run with an error of some library's own."""
    from qlora_dpo.training.folder import checkpoints

    save: Callable[..., Path] = checkpoints.save_checkpoint

    def fragile(*arguments: Any, **keywords: Any) -> Path:
        try:
            return save(*arguments, **keywords)
        except OSError as error:
            raise RuntimeError("unexpected position") from error

    replace_everywhere(save, fragile)


def trusts_rows() -> None:
    """Read rows without looking at their values."""
    from qlora_dpo.data import formats

    parse: Callable[..., Any] = formats.parse_row

    def careless(dataset_format: str, values: dict[str, Any], names: Any, origin: str) -> Any:
        values["chosen"] + values["rejected"]
        return parse(dataset_format, values, names, origin)

    replace_everywhere(formats.parse_row, careless)


def no_guard() -> None:
    """Serve pages as Gradio does."""
    from qlora_dpo.pages import guard, serving

    assert serving.Guard is guard.Guard
    replace_everywhere(guard.Guard, lambda app, hosts, logins: app)


def writes_anywhere() -> None:
    """Write over whatever is there, and take every folder with a config.yaml for a run."""
    from qlora_dpo.files import guard
    from qlora_dpo.training.folder import owned

    replace_everywhere(guard.check_output, lambda *_, **__: None)
    replace_everywhere(owned.is_run, lambda path: (path / owned.CONFIG).is_file())


BREAKAGES: dict[str, Callable[[], None]] = {
    "no-verification": no_verification,
    "no-random-states": no_random_states,
    "saves-in-place": saves_in_place,
    "deaf": deaf,
    "dies-without-room": dies_without_room,
    "trusts-rows": trusts_rows,
    "no-guard": no_guard,
    "writes-anywhere": writes_anywhere,
}
