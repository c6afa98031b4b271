"""A full disk: what is saved stays whole, the run goes on or ends with one sentence, and nothing is lost by it."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.bench import Bench, Row, counted, is_finished, log_of, newest_checkpoint
from benchmarks.chaos.victims import Victim

STORAGE = 74
ROOM = 3 * 2**20  # bytes of the small disk


@dataclass(frozen=True)
class LimitFiles:
    """From now on no file of this process can grow beyond `size` bytes: a write fails as on a full disk."""

    size: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def full_disk_rows(bench: Bench, count: int) -> list[Row]:
    """No room from the start of a continued run; no room for a while; a small disk that is filled."""
    return [no_room(bench, count), room_again(bench, count), small_disk(bench, count)]


def no_room(bench: Bench, count: int) -> Row:
    """Limits between a few bytes and the size of the largest file, so that one file or another fails."""
    row = Row(
        "full disk: from the start",
        "A continued run that cannot write: exit code 74 and one sentence, or the end; its checkpoint stays, and with "
        "room it continues to the same adapter and record.",
    )
    rng, template, codes = bench.rng("full disk"), bench.killed_at_the_last_save(), Counter[int]()
    largest = max(path.stat().st_size for path in template.rglob("*") if path.is_file())
    for number in range(count):
        sizes = (largest // 2, largest, int(10 ** rng.uniform(1, 4)), rng.randrange(largest))
        size = sizes[number if number < 2 else 2 + number % 2]
        with bench.scratch(template) as run, read_through_pipe(log_of(run)) as log:
            victim = bench.start(run, before=[LimitFiles(size)])
            code = victim.wait() or 0
            codes[code] += 1
            row.add(unkept(code, log.read()) + continued(bench, run), f"trial {number + 1}, files to {size} bytes")
    row.worst = counted(codes.elements())
    return row


def room_again(bench: Bench, count: int) -> Row:
    """Files are limited at a random moment, and no longer at a later one."""
    row = Row(
        "full disk: for a while",
        "No room from a random moment to another: the run goes on, or ends with 74 and one sentence; then as above.",
    )
    rng, codes = bench.rng("room again"), Counter[int]()
    for number in range(count):
        moments = sorted(bench.moment(rng) for _ in range(2))
        size = int(10 ** rng.uniform(1, 5))
        with bench.scratch() as run, read_through_pipe(log_of(run)) as log:
            victim = bench.start(run)
            limit_between(victim, moments, size)
            code = victim.wait() or 0
            codes[code] += 1
            trial = f"trial {number + 1}, files to {size} bytes from {moments[0]:.2f} to {moments[1]:.2f} s"
            row.add(unkept(code, log.read()) + continued(bench, run), trial)
    row.worst = counted(codes.elements())
    return row


def limit_between(victim: Victim, moments: list[float], size: int) -> None:
    """Set the victim's limit at the first moment and lift it at the second."""
    for moment, limit in zip(moments, (size, resource.RLIM_INFINITY), strict=True):
        if victim.wait(max(0.0, victim.started + moment - time.perf_counter())) is None:
            with suppress(ProcessLookupError):
                resource.prlimit(victim.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def small_disk(bench: Bench, count: int) -> Row:
    """A disk of a few megabytes, with the run's log on it, filled by another file at a random moment."""
    row = Row(
        "full disk: a small disk",
        "A disk that another file fills, the run's own log on it too: as above, once that file is gone.",
    )
    rng, codes = bench.rng("small disk"), Counter[int]()
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder)
        if reason := mount(disk):
            row.impossible = reason
            return row
        try:
            for number in range(count):
                moment = bench.moment(rng)
                code, problems = on_small_disk(bench, disk, moment, rng)
                codes[code] += 1
                row.add(problems, f"trial {number + 1}, full after {moment:.2f} s")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    row.worst = counted(codes.elements())
    return row


def on_small_disk(bench: Bench, disk: Path, moment: float, rng: random.Random) -> tuple[int, list[str]]:
    """One trial: (exit code on the full disk, problems)."""
    run, filler = disk / "run", disk / "filler"
    try:
        victim = bench.start(run, log=disk / "log")
        if victim.wait(moment) is None:
            fill(filler, leave=rng.choice([0, 0, 1000, 20_000]))
        code = victim.wait() or 0
        said = victim.said()
        filler.unlink(missing_ok=True)
        return code, unkept(code, said) + continued(bench, run)
    finally:
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def fill(file: Path, leave: int) -> None:
    """Take all the room on the file's disk but `leave` bytes."""
    with file.open("wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    with suppress(OSError):
        os.truncate(file, max(0, file.stat().st_size - leave))


def mount(folder: Path) -> str:
    """Mount a disk in memory there; the reason where that is refused."""
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError as error:
        return f"mount: {error.strerror}"
    return "" if done.returncode == 0 else (done.stderr.strip() or "mount is refused")


def unkept(code: int, said: str) -> list[str]:
    """What a run without room did not keep of the promise."""
    problems = []
    if code not in (0, STORAGE):
        problems.append(f"exit code {code}")
    if "Traceback" in said:
        problems.append("a traceback")
    if code == STORAGE and sum(line.startswith("error: ") for line in said.splitlines()) != 1:
        problems.append(f"not one sentence: {said[-200:]}")
    return problems


def continued(bench: Bench, run: Path) -> list[str]:
    """Give the command again with room: it takes the newest checkpoint there is, and ends the same."""
    newest, was_finished = newest_checkpoint(run), is_finished(run)
    problems = bench.to_the_end(run)
    said = log_of(run).read_text(encoding="utf-8")
    if newest and not was_finished and f"Continuing from checkpoint-{newest} " not in said:
        problems.append(f"checkpoint-{newest} was not whole")
    return problems


class Pipe:
    """What a run writes to its log, kept away from any disk."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(self) -> str:
        """Everything written; a pipe holds 64 kB, far more than these runs say. The path is free for a file then."""
        self._path.unlink()
        content = b""
        while piece := os.read(self._descriptor, 2**16):
            content += piece
        return content.decode("utf-8", "replace")

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


@contextmanager
def read_through_pipe(path: Path) -> Iterator[Pipe]:
    """A pipe at `path`: a limit on the size of files does not touch it."""
    pipe = Pipe(path)
    try:
        yield pipe
    finally:
        pipe.close()
