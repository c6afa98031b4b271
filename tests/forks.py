"""Commands in processes of their own, forked from one that has imported the libraries: as `python -m` runs them, but
started in a fraction of a second instead of ten."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["benchmarks.chaos.preload", "deepspeed"])


class Command:
    """A command that has been started; `subprocess.Popen` in miniature."""

    def __init__(
        self, words: Sequence[Any], log: Path | None = None, *, program: str = "qlora_dpo",
        before: Callable[[], None] | None = None, env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Start `python -m PROGRAM WORDS`; `before` is called in its process first, and must be picklable."""
        files = (os.devnull, os.devnull) if log is None else (f"{log}", f"{log}")
        if log is not None:
            log.touch()
        self._process = _start(program, words, files, before, env)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        code: int | None = self._process.exitcode
        return code

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise TimeoutExpired("the command", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    words: Sequence[Any], folder: Path, *, program: str = "qlora_dpo", before: Callable[[], None] | None = None,
    timeout: float = 300,
) -> CompletedProcess[str]:  # fmt: skip
    """Run a command to its end; what it says goes through files in `folder`."""
    out, err = (folder / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr"))
    process = _start(program, words, (str(out), str(err)), before, None)
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
        raise TimeoutExpired(list(map(str, words)), timeout)
    return CompletedProcess(list(words), code, out.read_text(), err.read_text())


def _start(
    program: str, words: Sequence[Any], files: tuple[str, str], before: Callable[[], None] | None,
    env: Mapping[str, str] | None,
) -> Any:  # fmt: skip
    variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | dict(env or {})
    process: Any = FORKS.Process(target=_run, args=(program, list(map(str, words)), files, before, variables))
    process.start()
    return process


def _run(
    program: str, words: list[str], files: tuple[str, str], before: Callable[[], None] | None, variables: dict[str, str]
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as in a command of its own
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    sys.exit(import_module(f"{program}.cli").main(words))
