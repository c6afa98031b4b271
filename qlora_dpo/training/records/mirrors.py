"""Tells the trackers what a run measures, each from a thread of its own: whatever one does, the run does not notice.

A tracker may raise, be slow or never answer, while it starts, in a call or at the end. The run only puts lines into a
queue. One that is slower than the run loses lines, one that raises or hangs is told nothing more, and each of these is
said once; metrics.jsonl has it all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Protocol, TypeVar

from qlora_dpo.redaction import redacted

logger = logging.getLogger(__name__)
Metrics = dict[str, float]
Samples = list[dict[str, Any]]
"""Rows of samples.jsonl."""
Result = TypeVar("Result")


class Tracker(Protocol):
    """A service or file that shows metrics."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Show one line of metrics.jsonl."""

    def show_samples(self, step: int, samples: Samples) -> None:
        """Show the answers of one evaluation."""

    def finish(self) -> None:
        """Flush and close."""


@dataclass(frozen=True)
class Limits:
    """How much of a tracker a run puts up with."""

    waiting_lines: int = 1000
    """Lines kept for a tracker that is slower than the run."""
    call_seconds: float = 60.0
    """A call that takes longer will not return."""
    finish_seconds: float = 8.0
    """What all trackers together have to close after the last step."""


class Mirror:
    """A tracker behind a queue and a daemon thread, which also starts it; no method here waits, but `wait`."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Tracker],
        limits: Limits | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """`release` frees the exit of the process from a tracker that was given up."""
        self.name = name
        self.limits = limits or Limits()
        self._release = release
        self._lines: SimpleQueue[Callable[[Tracker], None] | None] = SimpleQueue()
        self._called_at: float | None = None
        self._is_over, self._has_dropped = False, False
        self._lock = Lock()
        self._thread = Thread(target=self._serve, args=(start,), name=f"mirror {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Queue one line."""
        own = dict(metrics)
        self._queue(lambda tracker: tracker.log(step, own))

    def show_samples(self, step: int, samples: Samples) -> None:
        """Queue the answers of one evaluation."""
        own = [dict(sample) for sample in samples]
        self._queue(lambda tracker: tracker.show_samples(step, own))

    def _queue(self, line: Callable[[Tracker], None]) -> None:
        called_at = self._called_at
        if called_at is not None and time.monotonic() - called_at > self.limits.call_seconds:
            self._give_up(f"has not answered for {self.limits.call_seconds:g} seconds")
        if self._is_over:
            return
        if self._lines.qsize() < self.limits.waiting_lines:
            self._lines.put(line)
        elif not self._has_dropped:
            self._has_dropped = True
            logger.warning("%s is slower than the run and misses lines; metrics.jsonl has them all.", self.name)

    def close(self) -> None:
        """Ask to close after what is still queued."""
        self._lines.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until it has closed, or give it up."""
        self._thread.join(max(0.0, seconds))
        if self._thread.is_alive():
            self._give_up(f"has not closed within {self.limits.finish_seconds:g} seconds")

    def _serve(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = self._timed(start)
            while not self._is_over and (line := self._lines.get()) is not None:
                self._timed(partial(line, tracker))
            if not self._is_over:
                self._timed(tracker.finish)
        except BaseException as error:  # also SystemExit, with which libraries end what they take for their program
            self._give_up(f"failed ({redacted(str(error) or type(error).__name__)})")

    def _timed(self, call: Callable[[], Result]) -> Result:
        self._called_at = time.monotonic()
        try:
            return call()
        finally:
            self._called_at = None

    def _give_up(self, reason: str) -> None:
        """Say why once, and tell the tracker nothing more."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        logger.warning("%s %s and is no longer told; metrics.jsonl has it all.", self.name, reason)
        try:
            self._release()
        except Exception as error:
            logger.warning("%s may delay the end of this process (%s).", self.name, error)


def finish_mirrors(mirrors: Sequence[Mirror]) -> None:
    """Let all of them close at the same time, and wait no longer than the limit for all together."""
    for mirror in mirrors:
        mirror.close()
    started = time.monotonic()
    for mirror in mirrors:
        mirror.wait(mirror.limits.finish_seconds - (time.monotonic() - started))
