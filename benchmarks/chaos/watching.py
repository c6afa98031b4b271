"""Counts what a run does to its folder, and kills it at a chosen point. Runs in the victim itself.

Every creating, replacing and deleting of a file raises an audit event in Python before it happens, so a kill at event
k leaves the folder as events 1 to k - 1 and all writing up to then have made it. A torn kill leaves, besides, half of
the file that event k was about to write.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
HALF = b'{"step": 1, "loss": 0.69'


@dataclass(frozen=True)
class Event:
    """One change that is about to happen within the watched folder."""

    number: int
    name: str
    path: str
    """Relative to the folder."""

    @property
    def is_write(self) -> bool:
        """A file is about to be opened for writing."""
        return self.name == "open"


@dataclass(frozen=True)
class Trace:
    """Write every event to a file outside the folder, a line each."""

    folder: Path
    output: Path

    def __call__(self) -> None:
        descriptor = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        watch(
            self.folder,
            lambda event: os.write(descriptor, f"{event.number}\t{event.name}\t{event.path}\n".encode()),
        )


@dataclass(frozen=True)
class Crash:
    """Kill the process at event `number` of its folder, like a power cut that the page cache survives."""

    folder: Path
    number: int
    torn: bool = False

    def __call__(self) -> None:
        def act(event: Event) -> None:
            if event.number == self.number:
                if self.torn:
                    with open(self.folder / event.path, "ab") as file:
                        file.write(HALF)
                os.kill(os.getpid(), signal.SIGKILL)

        watch(self.folder, act)


@dataclass(frozen=True)
class CrashAt:
    """Kill the process when it is about to touch a path that begins with these characters."""

    folder: Path
    beginning: str

    def __call__(self) -> None:
        def act(event: Event) -> None:
            if event.path.startswith(self.beginning):
                os.kill(os.getpid(), signal.SIGKILL)

        watch(self.folder, act)


def read_trace(file: Path) -> list[Event]:
    """The events that a `Trace` wrote."""
    lines = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return [Event(int(number), name, path) for number, name, path in lines]


def watch(folder: Path, act: Callable[[Event], object]) -> None:
    """From now on call `act` before each change within `folder`; there is no way back."""
    root = str(folder.resolve())
    number, is_busy = 0, False

    def hook(name: str, arguments: tuple[object, ...]) -> None:
        nonlocal number, is_busy
        if is_busy or (name not in CHANGES and not _opens_to_write(name, arguments)):
            return
        is_busy = True  # what `act` itself does is not watched
        try:
            path = _path(name, arguments)
            if path is not None and path.startswith(root + os.sep):
                number += 1
                act(Event(number, name, path[len(root) + 1 :]))
        finally:
            is_busy = False

    sys.addaudithook(hook)


def _opens_to_write(name: str, arguments: tuple[object, ...]) -> bool:
    return name == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITES)


def _path(name: str, arguments: tuple[object, ...]) -> str | None:
    """The full path that an event is about; for a rename the new one."""
    place = 1 if name == "os.rename" else 0
    path = arguments[place]
    if not isinstance(path, str | bytes | os.PathLike):
        return None
    # shutil.rmtree names files by the descriptor of their folder.
    descriptors = [value for value in arguments[1:] if isinstance(value, int) and value >= 0]
    folder = os.getcwd()
    if name in {"os.remove", "os.rmdir"} and descriptors:
        folder = os.readlink(f"/proc/self/fd/{descriptors[0]}")
    return os.path.normpath(os.path.join(folder, os.fsdecode(path)))
