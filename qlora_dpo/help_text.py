"""What `--help` prints of a command: each option with the kind of its value, what it does, and its default."""

from __future__ import annotations

from argparse import Action
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from jsonargparse import DefaultHelpFormatter

from qlora_dpo.config.values import Names, Numbers

METAVARS = {int: "N", float: "X", Path: "PATH", Names: "NAMES", Numbers: "NUMBERS"}


class HelpFormatter(DefaultHelpFormatter):
    """argparse's layout; no types in Python's words, and no default where there is none."""

    def _get_help_string(self, action: Action) -> str:
        if not hasattr(action, "_typehint") or hasattr(action, "_jsonargparse_preexpanded_help"):
            return super()._get_help_string(action)
        if action.required:
            return f"{action.help} (required)"
        default = _as_given(action.default)
        return f"{action.help} (default: {default})" if default else str(action.help)

    def _get_default_metavar_for_optional(self, action: Action) -> str:
        hint = getattr(action, "_typehint", None)
        kinds = {hint, *get_args(hint)} & METAVARS.keys()
        return METAVARS[kinds.pop()] if kinds else "TEXT"


def usage_of(program: str, positional: Sequence[str]) -> str:
    """How a command is called, in a line."""
    return " ".join([f"python -m {program}", *(name.upper() for name in positional), "[options]"])


def _as_given(default: Any) -> str:
    """A default as it would be given on a command line."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, Names | Numbers):
        return " ".join(map(str, default))
    return "" if default is None else str(default)
