"""The table of evaluation commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eval.options import AppOptions
from qlora_dpo.command_line import Command, run_commands

COMMANDS = {
    "app": Command(
        "A page on 127.0.0.1: one prompt, the answers without and with the adapter.", (AppOptions,), "eval.app:serve"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_commands("eval", COMMANDS, sys.argv[1:] if argv is None else list(argv))
