"""Turns SIGTERM and SIGINT into a request that the loop answers between two micro-batches."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(Exception):
    """A signal asked the run to stop; raised where a stop is safe."""


class StopFlag:
    """Remembers the first signal; the second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler."""
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name

    def check(self) -> None:
        """Raise `StopRequested` when a signal has arrived."""
        if self.signal_name is not None:
            raise StopRequested(self.signal_name)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Within this block SIGTERM, SIGINT and SIGUSR1 set the flag, and SIGHUP (a closed terminal) is ignored."""
    flag = StopFlag()
    handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), flag.handle)
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield flag
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
