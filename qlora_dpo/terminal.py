"""What a command says on stderr, which may be a log on a full disk: then it is lost, and the command goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class _Outlasting:
    """A text stream whose writes never fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.has_failed = False

    def write(self, text: str) -> int:
        """Write, or lose, `text`."""
        try:
            return self._stream.write(text)
        except OSError:
            self.has_failed = True
            return len(text)

    def flush(self) -> None:
        """Flush what can be."""
        try:
            self._stream.flush()
        except OSError:
            self.has_failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def outlasting_stderr() -> Iterator[None]:
    """Within this block nothing that is written to stderr raises; at its end what the disk refused is dropped, because
    Python would otherwise try again when it exits, fail, and change the exit code."""
    stream = sys.stderr
    outlasting = _Outlasting(stream)
    sys.stderr = outlasting  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stderr = stream
        if outlasting.has_failed:
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Empty the stream's buffers into nothing where its file still takes nothing."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()
