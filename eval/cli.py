"""The table of evaluation commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from eval.options import AppOptions
from qlora_dpo.cli import Command, run_commands


def _app(options: AppOptions) -> None:
    from eval.app import serve

    serve(options)


def _app_options(options: dict[str, Any]) -> AppOptions:
    return AppOptions(**options)


COMMANDS = {
    "app": Command(
        "A page on 127.0.0.1: one prompt, the answers without and with the adapter.",
        (AppOptions,),
        _app_options,
        _app,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_commands("eval", COMMANDS, sys.argv[1:] if argv is None else list(argv))
