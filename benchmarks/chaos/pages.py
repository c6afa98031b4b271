"""The pages under attack, by raw HTTP and by other sites in a real browser."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.attack import PASSWORD, SECRET, Attack, Target
from benchmarks.chaos.attacks import RAW
from benchmarks.chaos.attacks_browser import CHROMIUM, by_browser
from benchmarks.chaos.bench import Bench, Row
from benchmarks.chaos.breakages import BREAKAGES
from benchmarks.chaos.victims import LIMIT_SECONDS, Victim, fork_function
from eval.answers import ANSWERS, Answer, AnswerFile
from eval.answers import Row as Compared
from qlora_dpo.pages.access import AUTH

# What Gradio would take for leave to serve more; none of it may reach a page.
VARIABLES = {
    "GRADIO_ALLOWED_PATHS": "/",
    "GRADIO_ROOT_PATH": "https://evil.example",
    "GRADIO_SERVER_NAME": "0.0.0.0",
    "GRADIO_SHARE": "True",
    "GRADIO_NUM_WORKERS": "2",
    "GRADIO_VIBE_MODE": "1",
    "GRADIO_PROFILING": "1",
    "GRADIO_LOCAL_DEV_MODE": "1",
    "GRADIO_RUN_HISTORY": "True",
    "GRADIO_MCP_SERVER": "True",
    "FORWARDED_ALLOW_IPS": "*",
}
ANSWER = Answer("a", 1, "stop", -1.0, -1.0, -1.0, -1.0, 0.0, 0.1)


@dataclass(frozen=True)
class ServePage:
    """A command that serves a page; to be called in another process."""

    program: str
    arguments: tuple[str, ...]

    def __call__(self) -> int:
        tempfile.tempdir = os.environ["TMPDIR"]  # the process that this one is forked from has chosen another
        if self.program == "eval":
            from eval.cli import main
        else:
            from qlora_dpo.cli import main
        return main(self.arguments)


def page_rows(bench: Bench, count: int | None) -> list[Row]:
    """Try `count` attacks by raw HTTP, and those of other sites in a browser where all are tried."""
    row = Row("pages", "A page shows and does what it is for, to whom it is for; of every attack nothing comes.")
    with targets(bench) as pages:
        for attack in spread(RAW, count):
            said, problems = attack(pages[attack.page])
            row.add(problems, attack.name)
            row.tried.append([attack.name, "raw HTTP", said])
        if count is None and CHROMIUM is not None:
            for name, said, problems in by_browser(pages["label"]):
                row.add(problems, name)
                row.tried.append([name, "Chromium", said])
    ways = Counter(how for _, how, _ in row.tried)
    row.worst = ", ".join(f"{times} by {how}" for how, times in ways.items())
    return [row]


def spread(attacks: list[Attack], count: int | None) -> list[Attack]:
    """So many of them, evenly."""
    if count is None or count >= len(attacks):
        return attacks
    return [attacks[number * len(attacks) // count] for number in range(count)]


@contextmanager
def targets(bench: Bench) -> Iterator[dict[str, Target]]:
    """Both pages, served by their commands in processes with an environment that wants more to be served."""
    folder = bench.folder / "pages"
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    secret = folder / "secret.txt"
    secret.write_bytes(SECRET)
    environment = VARIABLES | {"TMPDIR": str(scratch), AUTH: ":".join(PASSWORD)}
    victims = {
        name: fork_function(command, folder / f"{name}.log", environment, _broken(bench))
        for name, command in commands(folder).items()
    }
    try:
        yield {name: Target(port_of(victim), secret, scratch) for name, victim in victims.items()}
    finally:
        for victim in victims.values():
            victim.send(9)
            victim.wait(10)


def _broken(bench: Bench) -> list[Any]:
    return [BREAKAGES[bench.breakage]] if bench.breakage else []


def commands(folder: Path) -> dict[str, ServePage]:
    """The labelling page on this machine, and the page of a comparison on all addresses."""
    sets = folder / "answers.jsonl"
    sets.write_text("".join(json.dumps({"prompt": f"p{n}", "answers": ["a", "b"]}) + "\n" for n in range(50)))
    label = ("--candidates", str(sets), "--output", str(folder / "pairs.jsonl"), "--annotator", "ann", "--port", "0")
    compared = folder / "compared"
    AnswerFile(compared, {"adapter": "a"})
    with (compared / ANSWERS).open("a") as file:
        row = Compared(
            id="0" * 16,
            prompt="p",
            category=None,
            reference_answer=None,
            origin="p:1",
            seed=0,
            before=ANSWER,
            after=ANSWER,
        )
        file.write(json.dumps(asdict(row)) + "\n")
    return {
        "label": ServePage("qlora_dpo", ("label", "human", *label)),
        "app": ServePage(
            "eval", ("app", "--recorded", str(compared), "--host", "0.0.0.0", "--port", "0", "--auth", "true")
        ),
    }


def port_of(victim: Victim) -> int:
    """The port that a page says it is served on."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end and victim.wait(0.1) is None:
        if found := re.search(r"http://[\w.]+:(\d+)", victim.said()):
            return int(found[1])
    raise RuntimeError(f"no page is served: {victim.said()[-2000:]}")
