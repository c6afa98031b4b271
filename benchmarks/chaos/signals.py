"""Signals at any moment: a stop within seconds that nothing is lost by, and a closed terminal that changes nothing."""

from __future__ import annotations

import re
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.bench import Bench, Row, counted, is_finished, last_line, log_of, steps_recorded
from benchmarks.chaos.victims import Victim
from benchmarks.chaos.workload import STEPS

STOP_SECONDS = 2.0  # from the signal to the exit, on the tiny model
STOPS = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
BY_CTRL_C = 130  # outside of the training loop, where there is nothing to save
NOTHING_LOST = re.compile(r"nothing|starts? again", re.IGNORECASE)


@dataclass(frozen=True)
class Stop:
    """How a run ended after a signal."""

    signal: signal.Signals
    seconds: float
    code: int
    said: str
    had_begun: bool
    """The command had got as far as making its folder."""
    had_finished: bool
    steps: int
    """In the record when the signal was sent."""

    @property
    def is_outside(self) -> bool:
        """Ended by the system's own handling of the signal, before the command had begun or after it had finished."""
        return self.code not in (0, 75) and (self.had_finished or not self.had_begun)

    def broken(self) -> list[str]:
        """What is not as promised."""
        problems, last = [], last_line(self.said)
        accepted = {0, 75, BY_CTRL_C} if self.signal == signal.SIGINT else {0, 75}
        if self.code not in accepted and not self.is_outside:
            problems.append(f"exit code {self.code} ({last[:120]})")
        elif self.code in (75, BY_CTRL_C) and "is written" not in last and not NOTHING_LOST.search(last):
            problems.append(f"it does not say what is left: {last[:120]}")
        if self.code == 0 and self.steps < STEPS - 1:
            problems.append(f"it went on to the end from step {self.steps}")
        if self.seconds > STOP_SECONDS:
            problems.append(f"{self.seconds:.1f} s to exit")
        if "Traceback" in self.said and not self.is_outside:
            problems.append("a traceback")
        return problems


def signal_rows(bench: Bench, count: int) -> list[Row]:
    """Stop runs at random moments; hang up on a few."""
    return [stops(bench, count), hang_ups(bench, max(1, count // 10))]


def stops(bench: Bench, count: int) -> Row:
    """SIGTERM, SIGINT, SIGUSR1: exit code 75 after a checkpoint, which the same command continues from.

    Every other one comes in a certain step, all but the last of which are tried, whatever the machine's speed.
    """
    row = Row(
        "signals",
        f"SIGTERM, SIGINT, SIGUSR1 at any moment: exit within {STOP_SECONDS:.0f} s with code 75 (Ctrl-C where there is "
        "nothing to save: 130), saying what is left; the same command again continues from that checkpoint and ends "
        "with the same adapter and record.",
    )
    rng, stopped = bench.rng("signals"), list[Stop]()
    for number in range(count):
        spawned, name = bench.spawns(number), STOPS[number % len(STOPS)]
        steps = number * (STEPS - 2) // count if number % 2 else None
        with bench.scratch() as run:
            victim, problems, promised = bench.start(run, spawned=spawned), list[str](), None
            moment = bench.wait(victim, run, rng, spawned=spawned, steps=steps)
            if victim.wait(0) is None:
                stopped.append(stop(victim, run, name))
                problems = stopped[-1].broken()
                promised = re.search(r"(checkpoint-\d+) is written", last_line(stopped[-1].said))
            problems += bench.to_the_end(run)
            if promised and f"Continuing from {promised[1]} " not in log_of(run).read_text(encoding="utf-8"):
                problems.append(f"the next run did not continue from {promised[1]}")
            row.add(problems, f"trial {number + 1}, {name.name} after {moment:.2f} s{' (spawned)' if spawned else ''}")
    row.worst = figures(stopped)
    return row


def stop(victim: Victim, run: Path, name: signal.Signals) -> Stop:
    """Send the signal and wait for the end."""
    steps, sent = steps_recorded(run), time.perf_counter()
    victim.send(name)
    code = victim.wait()
    seconds = time.perf_counter() - sent
    assert code is not None
    return Stop(name, seconds, code, victim.said(), run.exists(), is_finished(run), steps)


def figures(stopped: list[Stop]) -> str:
    """The longest and the median time to exit, and how the runs ended."""
    if not stopped:
        return "every run had ended before its signal"
    seconds = [each.seconds for each in stopped]
    outside = sum(each.is_outside for each in stopped)
    return (
        f"{max(seconds):.2f} s to exit (median {statistics.median(seconds):.2f} s); "
        f"{counted(each.code for each in stopped)}; {outside} before the command had begun or after it had finished"
    )


def hang_ups(bench: Bench, count: int) -> Row:
    """SIGHUP: the run goes on to its end."""
    row = Row("hang-up", "SIGHUP (a closed terminal) at any moment: the run goes on to the same end.")
    rng, codes = bench.rng("hang-up"), Counter[int]()
    for number in range(count):
        moment = bench.moment(rng)
        with bench.scratch() as run:
            victim = bench.start(run)
            if victim.wait(moment) is None:
                victim.send(signal.SIGHUP)
            code = victim.wait() or 0
            codes[code] += 1
            problems = [] if code == 0 or not run.exists() else [f"exit code {code}"]
            row.add(problems + bench.to_the_end(run), f"trial {number + 1}, after {moment:.2f} s")
    row.worst = counted(codes.elements())
    return row
