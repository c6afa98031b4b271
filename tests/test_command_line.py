"""How a command line becomes a call: commands of one and of two words, values without a flag, what is misspelled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eval.cli import COMMANDS as EVAL_COMMANDS
from qlora_dpo.cli import COMMANDS as TOOL_COMMANDS
from qlora_dpo.command_line import Command, parse, run_commands
from qlora_dpo.config.checks import train_config
from qlora_dpo.config.training import quantization_of
from qlora_dpo.errors import UsageError


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


def test_the_home_folder_is_expanded_where_options_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "run.yaml"
    config.write_text("model_name_or_path: ~/m\nreference_model: ~/sft\ndataset: ~\noutput_dir: ~/runs/x\n")
    options = parse("x train", TOOL_COMMANDS["train"], ["--config", str(config), "--dataset=~/pairs.jsonl"])
    named = [str(options[name]) for name in ("model_name_or_path", "reference_model", "dataset", "output_dir")]
    assert named == [str(tmp_path / name) for name in ("m", "sft", "pairs.jsonl", "runs/x")]
    assert parse("x train", TOOL_COMMANDS["train"], ["--prompt_key", "~ or so"])["prompt_key"] == "~ or so"


@pytest.mark.parametrize("value", ['{"a": ', "[1]", "no"])
def test_template_arguments_are_a_json_object(value: str) -> None:
    given = parse("x train", TOOL_COMMANDS["train"], ["--chat_template_kwargs", '{"a": [1, true]}'])
    assert given["chat_template_kwargs"] == {"a": [1, True]}
    with pytest.raises(UsageError, match=r"--chat_template_kwargs .*: must be a JSON object"):
        parse("x train", TOOL_COMMANDS["train"], ["--chat_template_kwargs", value])


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


@pytest.mark.parametrize("name", [*TOOL_COMMANDS, *EVAL_COMMANDS])
def test_help_speaks_of_values_and_not_of_types(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, commands = ("qlora_dpo", TOOL_COMMANDS) if name in TOOL_COMMANDS else ("eval", EVAL_COMMANDS)
    with pytest.raises(SystemExit):
        run_commands(program, commands, [*name.split(), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    takes = " ".join([name, *(word.upper() for word in commands[name].positional)])
    assert said.startswith(f"usage: python -m {program} {takes} [options] {commands[name].summary}")
    for word in ("type:", "<class", "null)", "None)", "Literal", "True)", "False)", "()", "SUPPRESS"):
        assert word not in said, word


def test_help_of_an_option_says_kind_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_commands("qlora_dpo", TOOL_COMMANDS, ["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--lora_r N Rank. (default: 64)" in said
    assert "--output_dir PATH" in said and "--learning_rate X" in said and "--max_train_samples N" in said
    assert "--lora_target_modules NAMES" in said and "(default: all-linear)" in said
    assert "--fresh {true,false}" in said and "(default: false)" in said


@pytest.mark.parametrize(
    "more", [["--load_in_4bit", "--load_in_8bit"], ["--load_in_8bit=true", "--load_in_4bit", "True"]]
)
def test_two_ways_to_hold_the_base_are_refused(more: list[str]) -> None:
    with pytest.raises(UsageError, match="--load_in_4bit and --load_in_8bit are both given"):
        parse("x", TOOL_COMMANDS["train"], more)


@pytest.mark.parametrize("more", [["--load_in_8bit"], ["--load_in_4bit", "false", "--load_in_8bit"]])
def test_eight_bits_replace_four(more: list[str]) -> None:
    assert quantization_of(train_config(parse("x", TOOL_COMMANDS["train"], more)).model) == {"load_in_8bit": True}
