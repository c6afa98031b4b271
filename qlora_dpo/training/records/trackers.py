"""The trackers that --report_to names, as mirrors of metrics.jsonl that cannot harm a run."""

from __future__ import annotations

import json
import netrc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from qlora_dpo.errors import UsageError
from qlora_dpo.redaction import redacted
from qlora_dpo.training.records.mirrors import Limits, Metrics, Mirror, Samples, Tracker

WANDB_FINISH_SECONDS = 5.0  # below what a mirror has for it, so that wandb itself says how to upload the rest


def start_trackers(
    names: Sequence[str], folder: Path, run_name: str, options: dict[str, Any], *, run_id: str | None = None,
    limits: Limits | None = None,
) -> list[Mirror]:  # fmt: skip
    """Start the trackers named in --report_to; their packages are imported here, all else happens in their threads.

    A continued run that gives the `run_id` it had goes on in the same wandb run.

    Raises:
        UsageError: a tracker whose package is not installed.
    """
    kinds = {name: TRACKERS[name] for name in names if name != "none"}
    for name, kind in kinds.items():
        try:  # here, because packages with circular imports break when two threads import them
            import_module(kind.module)
        except ImportError as error:
            raise UsageError(f"--report_to {name} needs a package ({error}): pip install {name}.") from error
        except Exception:  # whatever else a broken installation raises: the thread meets it again and says so
            continue
    shown = {option: redacted(value) if isinstance(value, str) else value for option, value in options.items()}
    return [
        Mirror(name, partial(kind.start, folder, redacted(run_name), shown, run_id), limits, kind.release)
        for name, kind in kinds.items()
    ]


class WandbTracker:
    """Weights & Biases; offline unless logged in. Code, git state, console, command line and packages are not sent."""

    def __init__(self, folder: Path, run_name: str, options: dict[str, Any], run_id: str | None) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _wandb_login() else "offline")
        settings = wandb.Settings(
            disable_git=True, disable_code=True, console="off", x_disable_meta=True, x_save_requirements=False,
            init_timeout=30, finish_timeout=WANDB_FINISH_SECONDS,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "qlora_dpo"), name=run_name, dir=str(folder), config=options,
            mode=mode, settings=settings, id=run_id,
            resume="allow" if run_id is not None and mode == "online" else None,  # offline, `wandb sync` joins by id
        )  # fmt: skip

    def log(self, step: int, metrics: Metrics) -> None:
        self._run.log(metrics, step=step)

    def show_samples(self, step: int, samples: Samples) -> None:
        import wandb

        columns: list[str | int] = list(samples[0])
        table = wandb.Table(columns=columns, data=[list(sample.values()) for sample in samples])
        self._run.log({"samples": table}, step=step)

    def finish(self) -> None:
        self._run.finish()


def release_wandb() -> None:
    """Unregister wandb's exit hook, which waits without limit for its service process.

    wandb has no public call for this. The service writes what it has, and ends by itself when this process has ended.
    """
    setup: Any = sys.modules.get("wandb.sdk.wandb_setup")
    connection = getattr(setup and setup._singleton, "_connection", None)
    if connection is not None and connection._cleanup is not None:
        connection._cleanup()


class TensorBoardTracker:
    """TensorBoard event files in the run folder."""

    def __init__(self, folder: Path, run_name: str, options: dict[str, Any], run_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("options", json.dumps(options, indent=2, default=str))

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def show_samples(self, step: int, samples: Samples) -> None:
        for number, sample in enumerate(samples):
            words = "".join(f"    {name}: {text}\n" for name, text in sample.items())  # indented: shown as it is
            self._writer.add_text(f"samples/{number}", words, step)

    def finish(self) -> None:
        self._writer.close()


@dataclass(frozen=True)
class Kind:
    """A row of the table: what must be importable, what starts the tracker, what lets the process exit without it."""

    module: str
    start: Callable[[Path, str, dict[str, Any], str | None], Tracker]
    release: Callable[[], None] = lambda: None


TRACKERS = {
    "wandb": Kind("wandb", WandbTracker, release_wandb),
    "tensorboard": Kind("torch.utils.tensorboard", TensorBoardTracker),
}


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
