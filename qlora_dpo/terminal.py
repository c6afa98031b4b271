"""What a command writes to stdout and stderr: nothing in it steers the terminal, and a reader may leave.

stdout holds results: where it cannot be written the command says so, but a reader that has seen enough (`| head`) is no
error. stderr may be a log on a full disk: then what it says is lost, and the command goes on.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from qlora_dpo.errors import StorageError

CLOSED_PIPE = 141
"""Exit code of a command whose reader left, as a shell reports a program that SIGPIPE ended."""

# What this tool and libraries write themselves: colors, and the moves of a progress bar, which stand at the beginning.
_SHADE = "(?:[0-47]|22|39|[39][0-7])"
_COLOR = re.compile(rf"(\x1b\[{_SHADE}?(?:;{_SHADE})*m)")
_MOVE = re.compile(r"\r|(?:\x1b\[A)+\Z")


def visible(text: str) -> str:
    """The text with everything escaped that a terminal would obey or hide."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def visible_lines(text: str) -> str:
    """The same, but line breaks and tabs stay."""
    return "\n".join("\t".join(map(visible, line.split("\t"))) for line in text.split("\n"))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class _Guarded:
    """A text stream that passes on no control characters but those of lines, progress bars and libraries' colors."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.has_failed = False

    def write(self, text: str) -> int:
        """Write `text`, with what a terminal would obey escaped."""
        self._pass_on(_harmless(text))
        return len(text)

    def _pass_on(self, shown: str) -> None:
        try:
            self._stream.write(shown)
        except OSError as error:
            self._lost(error)
        except UnicodeEncodeError:  # a stream in ASCII
            encoding = self._stream.encoding or "ascii"
            self._pass_on(shown.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Flush what can be."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        """Text could not be written."""
        self.has_failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Results(_Guarded):
    """stdout: what its reader leaves is dropped; any other failure is one of the command."""

    def write(self, text: str) -> int:
        """Write `text`, without colors, while somebody reads. Raises: StorageError."""
        self._pass_on(_harmless(text, colors=False))
        return len(text)

    def write_colored(self, text: str) -> None:
        """Write `text` with its colors. Raises: StorageError."""
        self._pass_on(_harmless(text))

    def _pass_on(self, shown: str) -> None:
        if not self.has_failed:
            super()._pass_on(shown)

    def _lost(self, error: OSError) -> None:
        self.has_failed = True
        _drop(self._stream)
        if not isinstance(error, BrokenPipeError):
            raise StorageError(f"the results cannot be written to stdout: {error.strerror or error}.") from error


def print_colored(text: str) -> None:
    """Print text whose colors are the tool's own, around data that `visible` has made harmless."""
    getattr(sys.stdout, "write_colored", sys.stdout.write)(f"{text}\n")


def _harmless(text: str, colors: bool = True) -> str:
    if text.isprintable():
        return text
    move = _MOVE.match(text)
    start = move.end() if move else 0
    parts = _COLOR.split(text[start:]) if colors else [text[start:]]
    return text[:start] + "".join(part if place % 2 else visible_lines(part) for place, part in enumerate(parts))


@contextmanager
def guarded_output() -> Iterator[_Results]:
    """Within this block stdout and stderr are guarded; yields stdout, whose `has_failed` tells that nobody reads it.

    At the end what the file or the reader of stderr refused is dropped: Python would otherwise try again when it exits,
    fail, and change the exit code.
    """
    stdout, stderr = sys.stdout, sys.stderr
    results, log = _Results(stdout), _Guarded(stderr)
    sys.stdout, sys.stderr = results, log  # type: ignore[assignment]
    try:
        yield results
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        with suppress(StorageError):
            results.flush()
        log.flush()
        if log.has_failed:
            _drop(stderr)


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
