"""From a command line to one call: find the command in a table, read its options, run it, say what went wrong.

A command is one word (`train`) or two (`data lint`).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from qlora_dpo.config.checks import nearest
from qlora_dpo.config.values import Names, Numbers
from qlora_dpo.environment import prepare_process
from qlora_dpo.errors import Interrupted, QloraDpoError, UsageError
from qlora_dpo.redaction import redacted, refuse_secrets
from qlora_dpo.terminal import CLOSED_PIPE, guarded_output, visible_lines
from qlora_dpo.training.signals import Terminated

_HOME = re.compile(r"~[^/\s]*(?=/|$)")
NO_FLOAT16 = "float16 is not offered: its range ends at 65504, so DPO gradients overflow"
RENAMED = {
    "source_max_len": "--max_length (prompt plus answer) and --max_prompt_length (prompt alone)",
    "target_max_len": "--max_length (prompt plus answer) and --max_prompt_length (prompt alone)",
    "bits": "--load_in_4bit or --load_in_8bit",
    "double_quant": "--bnb_4bit_use_double_quant",
    "quant_type": "--bnb_4bit_quant_type",
    "gradient_checkpointing": "--activation_checkpointing auto|none|selective|full|offload",
    "bf16": "--dtype bfloat16",
    "fp16": f"--dtype bfloat16 ({NO_FLOAT16})",
    "torch_dtype": "--dtype",
    "bnb_4bit_compute_dtype": f"--dtype, which sets it too ({NO_FLOAT16})",
    "resume_from_checkpoint": "nothing: the same command again continues by itself; --fresh starts anew",
    "ref_model": "--reference_model",
    "dataset_name": "--dataset",
    "init_lora_weights": "nothing: PiSSA, LoftQ and their like change the base's weights, and the base with the "
    "adapter off is the reference, from which the first step must start; B starts at 0",
}


EITHER = (("load_in_4bit", "load_in_8bit"),)  # where the first is a default that the second overrides


@dataclass(frozen=True)
class Command:
    """A row of the table: what it does, its option groups, and the function that runs."""

    summary: str
    options: tuple[type, ...]
    run: str | Callable[..., None]
    """As `module:name` it is imported when it is called, so that `--help` needs no library."""
    build: Callable[[dict[str, Any]], tuple[Any, ...]] | None = None
    """The function's arguments, from flat options. Default: an object of each group."""
    positional: tuple[str, ...] = ()
    """Options that may be given without their names, in this order: `data lint pairs.jsonl`."""
    defaults: str | None = None
    """`module:name` of a function from the flat options to defaults that follow from them, such as what a run says
    about itself where its folder is named. What is given wins."""

    def __call__(self, options: dict[str, Any]) -> None:
        """Run with these flat options."""
        arguments = self.build(options) if self.build else tuple(_filled(group, options) for group in self.options)
        function = _imported(self.run) if isinstance(self.run, str) else self.run
        function(*arguments)


def _imported(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _filled(group: type, options: dict[str, Any]) -> Any:
    return group(**{option.name: options[option.name] for option in fields(group)})


def run_commands(program: str, commands: dict[str, Command], argv: list[str]) -> int:
    """Find the command in the table, read its options, call its function; returns the exit code."""
    with guarded_output() as results:
        code = _run(program, commands, argv)
    return CLOSED_PIPE if results.has_failed and not code else code


def _run(program: str, commands: dict[str, Command], argv: list[str]) -> int:
    try:
        if not argv or argv[0] in {"-h", "--help"}:
            print(_overview(program, commands), flush=True)
            return 0 if argv else UsageError.exit_code
        name = find_command(program, commands, argv)
        options = parse(f"{program} {name}", commands[name], argv[len(name.split()) :])
        refuse_secrets(options)
        prepare_process()
        commands[name](options)
        sys.stdout.flush()
        return 0
    except QloraDpoError as error:
        print(f"error: {visible_lines(redacted(str(error)))}", file=sys.stderr)
        return error.exit_code
    # Outside the training loop, which answers signals itself with a checkpoint; or Ctrl-C for the second time.
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C; the same command starts again where it can.", file=sys.stderr)
        return 130
    except Terminated as signal:
        print(f"Stopped by {signal}: nothing was lost; the same command starts again where it can.", file=sys.stderr)
        return Interrupted.exit_code


def find_command(program: str, commands: dict[str, Command], argv: Sequence[str]) -> str:
    """The name of the command that the line begins with.

    Raises:
        UsageError: there is none of that name; or only the first of its two words is there.
    """
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in commands:
            return name
    given = " ".join(word for word in argv[:2] if not word.startswith("-"))
    family = {name: command for name, command in commands.items() if name.split()[0] == argv[0]}
    if family:
        raise UsageError(f"{given!r} is not a command{nearest(given, family)}.\n" + _overview(program, family))
    raise UsageError(f"{argv[0]!r} is not a command{nearest(argv[0], commands)}.\n" + _overview(program, commands))


def _overview(program: str, commands: dict[str, Command]) -> str:
    width = max(map(len, commands))
    rows = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in commands.items())
    usage = f"usage: python -m {program} COMMAND [options]"
    return f"{usage}\n\n{rows}\n\npython -m {program} COMMAND --help lists the options."


def parse(program: str, command: Command, argv: list[str]) -> dict[str, Any]:
    """The command's options as a flat dict: defaults, then --config YAML, then the command line.

    Raises:
        UsageError: naming the option, and the nearest known one when it is unknown.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings
    from jsonargparse.typing import register_type

    from qlora_dpo.help_text import HelpFormatter, usage_of

    for kind in (Names, Numbers):
        register_type(kind, serializer=list, deserializer=kind, fail_already_registered=False)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=f"python -m {program}", usage=usage_of(program, command.positional), description=command.summary,
        formatter_class=HelpFormatter, parser_mode="omegaconf", exit_on_error=False,
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="PATH", action="config", help="YAML file of options; the command line wins."
    )
    for group in command.options:
        parser.add_class_arguments(group)
    kinds = {option.name: str(option.type) for group in command.options for option in fields(group)}
    argv = _name_positionals(argv, command.positional)
    _refuse_unknown_flags(argv, [*kinds, "config", "help", "print_config"])
    words = _join_values(argv, kinds)
    try:
        options = _home_expanded(parser.parse_args(words).as_dict())
        if command.defaults is not None:
            parser.set_defaults(_imported(command.defaults)(options))
            options = _home_expanded(parser.parse_args(words).as_dict())
    except ArgumentError as error:
        raise UsageError(_plain_words(str(error), kinds)) from error
    _refuse_both(words, options)
    return {name: options[name] for name in kinds}


def _home_expanded(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the user's folder in place of `~`, also where a shell does not write it: in YAML, behind `=`."""
    return {name: _expanded(value) for name, value in options.items()}


def _expanded(value: Any) -> Any:
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) and _HOME.match(value) else value


def _refuse_both(words: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse two options that mean either this or that, where the command line asks for both."""
    given = {word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")}
    for one, other in EITHER:
        if {one, other} <= given and options[one] and options[other]:
            raise UsageError(f"--{one} and --{other} are both given: leave one of them out.")


def _name_positionals(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """Put the flag before each value that stands before the first flag."""
    count = next((place for place, word in enumerate(argv) if word.startswith("-")), len(argv))
    if count > len(names):
        takes = " ".join(name.upper() for name in names)
        raise UsageError(f"{argv[len(names)]!r} is not expected here: the command takes {takes or 'flags only'}.")
    named = [word for name, value in zip(names, argv[:count], strict=False) for word in (f"--{name}", value)]
    return [*named, *argv[count:]]


def _refuse_unknown_flags(argv: list[str], known: list[str]) -> None:
    for argument in argv:
        name = argument.removeprefix("--").split("=")[0]
        if not argument.startswith("--") or name in known:
            continue
        if name in RENAMED:
            raise UsageError(f"--{name} is not an option of this tool: use {RENAMED[name]}.")
        raise UsageError(f"--{name} is not an option{nearest(name, known, '--')}. --help lists them all.")


def _join_values(argv: list[str], kinds: dict[str, str]) -> list[str]:
    """Let a switch stand alone (`--fresh`) and a list be written with spaces (`--report_to wandb tensorboard`)."""
    joined: list[str] = []
    position = 0
    while position < len(argv):
        flag = argv[position]
        values = []
        while position + 1 < len(argv) and not argv[position + 1].startswith("--"):
            position += 1
            values.append(argv[position])
        position += 1
        kind = kinds.get(flag.removeprefix("--"), "")
        if kind == "bool" and not values:
            values = ["true"]
        if kind in {"Names", "Numbers"} and values:
            values = [",".join(values)]
        joined += [f"{flag}={values[0]}", *values[1:]] if values and flag.startswith("--") else [flag, *values]
    return joined


def _plain_words(message: str, known: dict[str, str]) -> str:
    """The parser's message in the words of this tool."""
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown:
        name = unknown[1]
        if name in RENAMED:
            return f"{name} (in --config) is not an option of this tool: use {RENAMED[name]}."
        return f"{name} (in --config) is not an option{nearest(name, list(known))}."
    asked = re.search(r'"dtype".*Got value: ((?:torch\.)?(?:float16|fp16|half))\b', message, re.DOTALL)
    if asked and "'float16'" not in message:  # merge stores it, training does not compute in it
        return f"--dtype {asked[1]}: {NO_FLOAT16}. Use bfloat16 (the default) or float32."
    json_object = re.search(r'Parser key "([^"]+)".*dict\[str.*Given value: (.*)', message, re.DOTALL)
    if json_object:
        return (
            f"--{json_object[1]} {json_object[2].strip()}: must be a JSON object, on the command line in quotes: "
            "'{\"enable_thinking\": false}'."
        )
    message = re.sub(r'Parser key "([^"]+)":\s*', r"--\1: ", message)
    return re.sub(r"<class '([^']+)'>", r"\1", message)
