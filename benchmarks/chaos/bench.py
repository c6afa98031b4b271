"""Where runs are broken: the workload, what its unbroken run gives, how long it takes, and the rows of the table."""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from benchmarks import processes
from benchmarks.chaos.breakages import BREAKAGES
from benchmarks.chaos.victims import Prepare, Victim, fork, spawn
from benchmarks.chaos.watching import CrashAt
from benchmarks.chaos.workload import STEPS, Outcome, Workload, make_workload, read_outcome

STEP_SECONDS = 0.1  # about what a step and what is written after it take
SPAWNED_EVERY = 10  # trials one is started as a user starts it, imports included

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@dataclass
class Row:
    """A promise, how often it was tried, and how often it held."""

    name: str
    promise: str
    trials: int = 0
    passed: int = 0
    worst: str = ""
    """The worst figure that was seen, in words."""
    failures: list[str] = field(default_factory=list)
    impossible: str = ""
    """Why this machine cannot try it."""
    needs_failures: bool = False
    """A control: it must be seen to fail."""
    seconds: float = 0.0
    tried: list[list[str]] = field(default_factory=list)
    """What was tried, how, and what came of it, where trials have names."""

    @property
    def verdict(self) -> str:
        """passed, FAILED or not possible here."""
        if self.impossible:
            return "not possible here"
        holds = self.passed < self.trials if self.needs_failures else self.passed == self.trials > 0
        return "passed" if holds else "FAILED"

    def add(self, problems: Sequence[str], trial: str) -> None:
        """Count a trial; it passed where there are no problems."""
        self.trials += 1
        self.passed += not problems
        if problems:
            self.failures.append(f"{trial}: {'; '.join(problems)}")
        mark = "." if not problems else "F"
        print(mark, end="", file=sys.stderr, flush=True)


@dataclass
class Bench:
    """A folder to work in, the workload and its unbroken outcome."""

    folder: Path
    seed: int
    workload: Workload
    breakage: str | None = None
    expected: Outcome = field(init=False)
    seconds: dict[str, float] = field(init=False)
    """Of an unbroken run, by how it is started: forked or spawned."""

    @classmethod
    def make(cls, folder: Path, seed: int, breakage: str | None = None) -> Bench:
        """Make the workload; runs nothing yet."""
        return cls(folder, seed, call(make_workload, folder, seed), breakage)

    def measure(self, spawned: bool) -> None:
        """Run without a disturbance, forked twice and, where trials will be `spawned`, once as a user does.

        Raises:
            RuntimeError: they do not agree, so nothing could be told from a disturbed run.
        """
        outcomes, seconds = [], defaultdict[str, list[float]](list)
        for number, kind in enumerate(("forked", "forked", "spawned")[: 3 if spawned else 2]):
            name = f"unbroken-{number}"
            victim = self.start(self.folder / name, spawned=kind == "spawned", sound=True)
            code = victim.wait()
            seconds[kind].append(time.perf_counter() - victim.started)
            if code != 0:
                raise RuntimeError(f"an undisturbed run ended with {code}: {victim.said()[-3000:]}")
            outcomes.append(read_outcome(self.folder / name))
        for outcome in outcomes[1:]:
            if problems := outcome.differences(outcomes[0]):
                raise RuntimeError(f"two undisturbed runs differ: {'; '.join(problems)}")
        self.expected = outcomes[0]
        self.seconds = {kind: statistics.mean(values) for kind, values in seconds.items()}

    def spawns(self, number: int) -> bool:
        """Whether this trial is started as a user starts it; what is broken on purpose is so in forked runs only."""
        return self.breakage is None and number % SPAWNED_EVERY == SPAWNED_EVERY - 1

    def moment(self, rng: random.Random, spawned: bool = False) -> float:
        """Any moment of a run, in seconds from its start."""
        return rng.uniform(0, self.seconds["spawned" if spawned else "forked"])

    def wait(self, victim: Victim, run: Path, rng: random.Random, *, spawned: bool, steps: int | None) -> float:
        """Wait until a random part of a run's usual duration is over, or of a step's once so many `steps` are in its
        record; returns the seconds since its start."""
        moment = self.moment(rng, spawned)
        if steps is not None:
            while steps_recorded(run) < steps and victim.wait(0.005) is None:
                pass
            moment = time.perf_counter() - victim.started + rng.uniform(0, STEP_SECONDS)
        victim.wait(max(0.0, victim.started + moment - time.perf_counter()))
        return moment

    def rng(self, name: str) -> random.Random:
        """Random numbers for a row; the same for the same seed, whichever rows run."""
        return random.Random(f"{self.seed} {name}")

    def start(
        self, run: Path, *, spawned: bool = False, before: Sequence[Prepare] = (), log: Path | None = None,
        sound: bool = False,
    ) -> Victim:  # fmt: skip
        """Start the command on a run folder, broken on purpose where asked for and not `sound`."""
        arguments, environment = self.workload.arguments(run), {"QLORA_DPO_CACHE": str(cache_of(run))}
        log = log or log_of(run)
        if spawned:
            return spawn(arguments, log, environment)
        broken = [BREAKAGES[self.breakage]] if self.breakage and not sound else []
        return fork(arguments, log, environment, [*broken, *before])

    def to_the_end(self, run: Path) -> list[str]:
        """Give the same command again, with a log of its own, undisturbed; what is not as in the unbroken run."""
        log_of(run).unlink(missing_ok=True)
        victim = self.start(run)
        try:
            code = victim.wait()
        except TimeoutError as error:
            return [str(error)]
        if code != 0:
            return [f"the same command again ends with {code}: {last_line(victim.said())}"]
        return read_outcome(run).differences(self.expected)

    def template(self, name: str, beginning: str) -> Path:
        """A run that was killed when it was about to touch a path that begins so; made once."""
        run = self.folder / f"template-{name}"
        if not run.exists():
            victim = self.start(run, before=[CrashAt(run, beginning)], sound=True)
            code = victim.wait()
            if code != -9:
                raise RuntimeError(f"the run never touched {beginning}: it ended with {code}")
        return run

    def killed_at_the_last_save(self) -> Path:
        """A run with all its steps in the record whose newest checkpoints are those before the last."""
        return self.template("last-save", f".staging-checkpoint-{STEPS}")

    @contextmanager
    def scratch(self, template: Path | None = None) -> Iterator[Path]:
        """A run folder of its own, new or a copy of `template`, that is deleted afterwards."""
        run = self.folder / "scratch" / "run"
        if template is not None:
            shutil.copytree(template, run)
            shutil.copytree(cache_of(template), cache_of(run))
        else:
            run.parent.mkdir(parents=True)
        try:
            yield run
        finally:
            shutil.rmtree(run.parent)


def call(function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
    """Call a module's function in a process forked from the server; hands back what it returns or raises."""
    processes.start_server(("benchmarks.chaos.preload",))
    return processes.run(partial(function, *args, **kwargs))


def cache_of(run: Path) -> Path:
    """The tokenized pairs of a run: beside it, so that every run tokenizes for itself."""
    return run.with_name(f"{run.name}-cache")


def log_of(run: Path) -> Path:
    """What a run printed."""
    return run.with_name(f"{run.name}.log")


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "(nothing)")


def steps_recorded(run: Path) -> int:
    """Whole lines of metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def is_finished(run: Path) -> bool:
    """run.json says so."""
    file = run / "run.json"
    return file.exists() and json.loads(file.read_text(encoding="utf-8")).get("status") == "finished"


def counted(codes: Iterable[int]) -> str:
    """How runs ended, in words."""
    return "exit codes " + ", ".join(f"{times} x {code}" for code, times in sorted(Counter(codes).items()))


def newest_checkpoint(run: Path) -> int:
    """Step of the newest checkpoint folder, whole or not; 0 where there is none."""
    numbers = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run.glob("checkpoint-*"))
    return max((int(number[1]) for number in numbers if number), default=0)
