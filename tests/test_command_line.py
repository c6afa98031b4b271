"""How a command line becomes a call: commands of one and of two words, values without a flag, what is misspelled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from qlora_dpo.command_line import Command, run_commands


@dataclass(frozen=True)
class Source:
    """Where from."""

    file: str
    """A file."""


@dataclass(frozen=True)
class Limits:
    """How much."""

    most: int = 3
    """Rows."""


calls: list[tuple[Any, ...]] = []
COMMANDS = {
    "data lint": Command("Look.", (Source, Limits), lambda *arguments: calls.append(arguments), positional=("file",)),
    "data mix": Command("Mix.", (Limits,), lambda *arguments: calls.append(arguments)),
    "env": Command("Say.", (), lambda *arguments: calls.append(arguments)),
}


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("data lint a.jsonl --most 5", (Source("a.jsonl"), Limits(5))),
        ("data lint --file a.jsonl", (Source("a.jsonl"), Limits())),
        ("data mix", (Limits(),)),
        ("env", ()),
    ],
)
def test_function_gets_an_object_of_each_group(line: str, arguments: tuple[Any, ...]) -> None:
    calls.clear()
    assert run_commands("x", COMMANDS, line.split()) == 0
    assert calls == [arguments]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("data", ["'data' is not a command", "data lint"]),
        ("data lnt a", ["'data lnt' is not a command; the nearest is data lint"]),
        ("data --most 3", ["'data' is not a command", "data mix"]),
        ("dta", ["'dta' is not a command"]),
        ("data lint a b", ["'b' is not expected here: the command takes FILE"]),
        ("data mix a", ["'a' is not expected here: the command takes flags only"]),
    ],
)
def test_what_cannot_be_understood_is_said(line: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_commands("x", COMMANDS, line.split()) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
