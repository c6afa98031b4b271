"""The table of commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qlora_dpo.command_line import Command, run_commands
from qlora_dpo.config.checks import plan_config, train_config
from qlora_dpo.config.release import MergeOptions
from qlora_dpo.config.training import TRAIN_GROUPS, PlanOptions
from qlora_dpo.training.signals import terminable

COMMANDS = {
    "train": Command(
        "Align a model with DPO: quantize, train a LoRA adapter, show before and after. No arguments: the demo.",
        tuple(TRAIN_GROUPS.values()),
        "qlora_dpo.demo.run:run_training",
        lambda options: (train_config(options),),
    ),
    "plan": Command(
        "Say where each GB goes, how long it takes and what it costs, before anything is loaded.",
        (*TRAIN_GROUPS.values(), PlanOptions),
        "qlora_dpo.training.plan:plan",
        plan_config,
    ),
    "merge": Command(
        "Merge an adapter into a plain 16-bit model folder.", (MergeOptions,), "qlora_dpo.release.merge:merge"
    ),
    "env": Command("Print versions and devices, for a bug report.", (), "qlora_dpo.environment:print_description"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one clear text on stderr, no traceback."""
    with terminable():
        return run_commands("qlora_dpo", COMMANDS, sys.argv[1:] if argv is None else list(argv))
