"""What may differ when a run goes on: which options, what they stand for, and who allowed it.

Options are compared by value, and what three of them name by content: the pairs, the base, the reference adapter. Where
a change of one explains the other (another --max_length makes other token ids), the one is asked about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qlora_dpo.config.training import DataOptions, TrainConfig
from qlora_dpo.errors import UsageError

# What is asked for once and is no setting of the run.
ONE_TIME = {"fresh", "allow_changed"}
# Options that may differ without a word: they change where the run reports and how it is cut, not what it computes.
FREE = ONE_TIME | {
    "output_dir", "report_to", "run_name", "logging_steps", "eval_steps", "save_steps", "save_minutes",
    "save_total_limit", "sample_generate", "max_new_tokens", "max_tokens_per_microbatch", "activation_checkpointing",
    "lint", "reference_store", "max_drift",
}  # fmt: skip
# Options that checkpoints are made of: nothing could go on from one with other values.
FIXED = {"lora_r", "lora_target_modules", "use_dora", "modules_to_save", "loraplus_lr_ratio", "optim"}
# Options that give a finished run steps to do.
LENGTHENING = {"max_steps", "num_train_epochs"}
# For each option whose content is compared, the options that decide about that content.
CONTENT = {
    "dataset": {option.name for option in fields(DataOptions)} | {"model_name_or_path", "model_revision"},
    "model_name_or_path": {"model_name_or_path", "model_revision"},
    "reference_model": {"reference_model"},
}


@dataclass(frozen=True)
class Change:
    """One difference between what a run began with and what is asked for now."""

    name: str
    was: Any
    now: Any

    @property
    def may_add_steps(self) -> bool:
        """A finished run may have steps to do with it."""
        return self.name in LENGTHENING and (self.now > self.was or self.now <= 0)

    def __str__(self) -> str:
        note = " (no checkpoint could go on with that)" if self.name in FIXED else ""
        return f"  {self.name}: was {self.was}, now {self.now}{note}"


def options_hash(options: Mapping[str, Any]) -> str:
    """Hash of the options that decide what a run computes."""
    deciding = {name: value for name, value in options.items() if name not in FREE}
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, default=str).encode()).hexdigest()


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The options that differ, by name; one that a config.yaml does not know had its default."""
    default = TrainConfig().flat()
    unread = {"num_train_epochs"} if all(options.get("max_steps", -1) > 0 for options in (before, now)) else set[str]()
    changes = [
        Change(name, before.get(name, default.get(name)), now.get(name, default.get(name)))
        for name in sorted(before.keys() | now.keys())
        if name not in FREE | unread
    ]
    return [change for change in changes if change.was != change.now]


def changed_content(
    before: Mapping[str, str], now: Mapping[str, str], options: Sequence[Change], allowed: Collection[str]
) -> list[Change]:
    """Where the same options stand for something else now, or allowed changes have made it so."""
    explained = {change.name for change in options} & set(allowed)
    # Fingerprints of two forms, such as those that older versions noted, say nothing about each other.
    before = {name: value for name, value in before.items() if len(value) == len(now.get(name, ""))}
    changes = []
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name] and not explained & CONTENT[name]:
            changes.append(Change(name, f"content {before[name][:12]}", f"content {now[name][:12]}"))
    return changes


def refuse(path: Path, changes: Sequence[Change], allowed: Collection[str], *, is_finished: bool = False) -> None:
    """Refuse what has changed and was not allowed, or cannot be; in a finished run also what leaves it nothing to do.

    Raises:
        UsageError: with the list of what differs.
    """
    if is_finished and changes and not any(change.may_add_steps for change in changes):
        raise UsageError(
            f"{path} holds a finished run that began otherwise:\n" + "\n".join(map(str, changes)) + "\nNothing is left "
            "to train with that: name another --output_dir, start anew with --fresh, or give it more steps (a larger "
            "--max_steps or --num_train_epochs)."
        )
    refused = [change for change in changes if change.name not in allowed or change.name in FIXED]
    if not refused:
        return
    names = " ".join(dict.fromkeys(change.name for change in refused if change.name not in FIXED))
    allow = f", or let it go on with the change: --allow_changed {names}" if names else ""
    raise UsageError(
        f"{path} holds a run that began otherwise:\n" + "\n".join(map(str, refused)) + "\nContinue it with what it "
        f"began with, name another --output_dir, start anew with --fresh{allow}."
    )


def refuse_pointless(
    path: Path, changes: Sequence[Change], allowed: Collection[str], past: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse a name in --allow_changed that allows nothing. A change that was allowed before stays allowed, so that the
    same command continues a run that was stopped after it.

    Raises:
        UsageError: naming it.
    """
    known = {change.name for change in changes} | {entry["name"] for entry in past}
    pointless = [name for name in allowed if name not in known]
    if pointless:
        free = [name for name in pointless if name in FREE]
        why = f" ({', '.join(free)} may differ without it)" if free else ""
        raise UsageError(
            f"--allow_changed {' '.join(pointless)}: nothing has changed there since the run in {path} began{why}. "
            "Leave it out."
        )


def record(past: Sequence[Mapping[str, Any]], changes: Sequence[Change], step: int) -> list[dict[str, Any]]:
    """The list for run.json: what was changed, at which step, and how."""
    entries = [{"step": step, "name": change.name, "was": change.was, "now": change.now} for change in changes]
    return [*map(dict, past), *(entry for entry in entries if entry not in past)]
