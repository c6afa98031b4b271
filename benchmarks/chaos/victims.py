"""Runs that are made to be broken: real processes with a pid, a log and an exit code.

Most are forked from a server that has imported the libraries, which saves several seconds each; some are started as a
user starts them. A forked run calls the same `main` with the same arguments.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from pathlib import Path

from benchmarks.processes import ROOT, start_server

Prepare = Callable[[], None]
"""Called in a forked run before anything else; picklable."""

LIMIT_SECONDS = 180  # that any run may take before it counts as hanging


@dataclass
class Victim:
    """A run that has been started."""

    pid: int
    log: Path
    _wait: Callable[[float | None], int | None]
    started: float = field(default_factory=time.perf_counter)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code (negative: killed by that signal), or None where it still runs after `seconds`.

        Raises:
            TimeoutError: without `seconds`: it does not end at all, and has been killed.
        """
        code = self._wait(LIMIT_SECONDS if seconds is None else seconds)
        if code is None and seconds is None:
            self.send(signal.SIGKILL)
            self._wait(10)
            raise TimeoutError(f"a run did not end within {LIMIT_SECONDS} s; its log ends {self.said()[-300:]!r}")
        return code

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, where it has not ended meanwhile."""
        if self._wait(0) is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def said(self) -> str:
        """Everything that it has written so far to stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def fork(arguments: Sequence[str], log: Path, environment: Mapping[str, str], before: Sequence[Prepare] = ()) -> Victim:
    """Start `python -m qlora_dpo ARGUMENTS` in a forked process."""
    return fork_function(Command(tuple(arguments)), log, environment, before)


def fork_function(
    function: Callable[[], int], log: Path, environment: Mapping[str, str], before: Sequence[Prepare] = ()
) -> Victim:
    """Start a picklable function in a forked process; what it returns is the exit code."""
    start_server(("benchmarks.chaos.preload",))
    process = get_context("forkserver").Process(
        target=_run, args=(function, log, dict(environment), tuple(before)), daemon=True
    )
    started = time.perf_counter()
    process.start()

    def wait(seconds: float | None) -> int | None:
        process.join(seconds)
        return process.exitcode

    assert process.pid is not None
    return Victim(process.pid, log, wait, started)


def spawn(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Victim:
    """Start `python -m qlora_dpo ARGUMENTS` as a user does."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_dpo", *arguments],
            cwd=ROOT, env=os.environ | dict(environment), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            preexec_fn=hear_ctrl_c,
        )  # fmt: skip

    def wait(seconds: float | None) -> int | None:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    return Victim(process.pid, log, wait)


@dataclass(frozen=True)
class Command:
    """The command line, to be called in another process."""

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        from qlora_dpo.cli import main

        return main(self.arguments)


def hear_ctrl_c() -> None:
    """Undo what a shell does to commands that it starts with `&`: they ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _run(function: Callable[[], int], log: Path, environment: dict[str, str], before: tuple[Prepare, ...]) -> None:
    set_start_method("fork", force=True)  # as in a command of its own; locks of killed processes would be left behind
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    hear_ctrl_c()
    for prepare in before:
        prepare()
    sys.exit(function())
