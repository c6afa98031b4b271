"""The table of evaluation commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eval.options import AppOptions, CompareOptions, GateOptions, ReportOptions, VerdictOptions
from qlora_dpo.command_line import Command, run_commands
from qlora_dpo.config.checks import train_config
from qlora_dpo.config.labeling import EndpointOptions
from qlora_dpo.config.training import TRAIN_GROUPS
from qlora_dpo.training.signals import terminable

COMMANDS = {
    "compare": Command(
        "Answer the same prompts without and with an adapter, and say which answers are better, and how surely.",
        (CompareOptions, VerdictOptions, EndpointOptions),
        "eval.compare:compare",
    ),
    "demo": Command(
        "Train the embedded demo, compare its answers before and after, and let them through the gate.",
        tuple(TRAIN_GROUPS.values()),
        "eval.demo:demo",
        lambda options: (train_config(options),),
    ),
    "gate": Command(
        "Check the numbers of a comparison by a YAML list of rules; exit code 1 where one does not hold.",
        (GateOptions,),
        "eval.gate:gate",
        positional=("result",),
    ),
    "report": Command(
        "Write one HTML page of a run, finished or still going: curves, data, samples, verdicts, cost.",
        (ReportOptions,),
        "eval.report.command:report",
        positional=("run",),
    ),
    "app": Command(
        "A page on 127.0.0.1: compare answers before and after, vote blindly, read the run.",
        (AppOptions,),
        "eval.app:serve",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    with terminable():
        return run_commands("eval", COMMANDS, sys.argv[1:] if argv is None else list(argv))
