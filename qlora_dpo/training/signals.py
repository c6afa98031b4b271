"""What signals do: within the training loop a request that it answers between two micro-batches, outside of it the end.

SIGTERM, SIGUSR1   a checkpoint, exit code 75; where nothing is trained yet, or no longer: exit code 75
SIGINT (Ctrl-C)    the same, and the second time the end at once, exit code 130; outside the loop 130
SIGHUP             a closed terminal: the run goes on without it
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
TERMINATING = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """A signal asked the run to stop; raised where a stop is safe."""


class Terminated(BaseException):
    """A signal ended the process where nothing has to be saved. No Exception, so that no library takes it for its own
    failure: it passes everything that KeyboardInterrupt passes."""


class StopFlag:
    """Remembers the first signal; the second Ctrl-C stops at once."""

    def __init__(self, says: bool = True) -> None:
        """`says` is false in all but one of the processes of a run."""
        self.signal_name: str | None = None
        self._says = says

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            if self._says:
                _say(f"{self.signal_name}: stopping after this micro-batch; Ctrl-C stops at once.")

    def check(self) -> None:
        """Raise `StopRequested` when a signal has arrived."""
        if self.signal_name is not None:
            raise StopRequested(self.signal_name)


@contextmanager
def stop_on_signals(says: bool = True) -> Iterator[StopFlag]:
    """Within this block SIGTERM, SIGINT and SIGUSR1 set the flag."""
    flag = StopFlag(says)
    with _handlers(dict.fromkeys((*TERMINATING, signal.SIGINT), flag.handle)):
        yield flag


@contextmanager
def terminable() -> Iterator[None]:
    """Within this block SIGTERM and SIGUSR1 raise `Terminated`, as Ctrl-C raises KeyboardInterrupt, and the process
    outlives its terminal."""
    terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]

    def terminate(number: int, _frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    def let_go(_number: int, _frame: FrameType | None) -> None:
        _say("SIGHUP: the terminal is gone, and the run goes on without it.")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in terminals:  # every write to a closed terminal would fail
            os.dup2(null, descriptor)
        os.close(null)

    with _handlers(dict.fromkeys(TERMINATING, terminate) | {signal.SIGHUP: let_go}):
        yield


@contextmanager
def _handlers(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    """Within this block these signals are handled so; outside the main thread, where Python allows none, as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _say(line: str) -> None:
    """Write to stderr past Python's buffers, which a handler may have interrupted; no matter where it is closed."""
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
