"""Damaged checkpoints: passed over with a reason, and never loaded silently."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos.bench import Bench, Row, call, log_of, newest_checkpoint
from benchmarks.chaos.breakages import BREAKAGES
from benchmarks.chaos.watching import CrashAt
from benchmarks.chaos.workload import SAVE_STEPS, STEPS

PAGE = 4096


def corruption_rows(bench: Bench, count: int, runs: int) -> list[Row]:
    """Damage checkpoints and ask what a run would continue from; then let a few runs continue."""
    row = Row(
        "corruption", "The newest checkpoint damaged in any file: the one before is taken, the reason names the file."
    )
    template = bench.killed_at_the_last_save()
    with bench.scratch(template) as run:
        for trial, problems in call(damage_many, run, count, f"{bench.seed} corruption", bench.breakage):
            row.add(problems, trial)
    row.worst = f"{row.trials - row.passed} loaded silently or without a reason"
    return [row, whole_runs(bench, template, runs), all_damaged(bench, template)]


def damage_many(run: Path, count: int, seed: str, breakage: str | None) -> list[tuple[str, list[str]]]:
    """(what was done, problems) of `count` damages to the newest checkpoint of a run folder. Runs in a fork."""
    if breakage:
        BREAKAGES[breakage]()
    rng = random.Random(seed)
    newest = run / f"checkpoint-{newest_checkpoint(run)}"
    sound = run.with_name("sound")
    shutil.copytree(newest, sound)
    found = []
    for number in range(count):
        done = damage(newest, rng)
        found.append((f"trial {number + 1}, {done}", unnoticed(newest, sound, done.split()[0])))
        shutil.rmtree(newest)
        shutil.copytree(sound, newest)
    return found


def unnoticed(newest: Path, sound: Path, file: str) -> list[str]:
    """What is wrong with the choice that is made now that `file` of the newest checkpoint is damaged."""
    from qlora_dpo.training.folder.checkpoints import load_state, newest_valid

    try:
        chosen, reasons = newest_valid(newest.parent)
        if chosen is None:
            return ["no checkpoint is taken at all"]
        if chosen == newest:
            return [] if is_harmless(newest, sound) else ["it is taken as if it were whole"]
        load_state(chosen)
    except Exception as error:  # whatever it is, the user sees a traceback
        return [f"{type(error).__name__}: {error}"]
    named = any(newest.name in reason and (file in reason or file == "manifest.json") for reason in reasons)
    return [] if named else [f"the reason does not name it: {reasons}"]


def is_harmless(newest: Path, sound: Path) -> bool:
    """The damage changed white space of the manifest, and nothing else."""
    names = {path.name for path in sound.iterdir()}
    if names != {path.name for path in newest.iterdir()}:
        return False
    changed = [name for name in names if (newest / name).read_bytes() != (sound / name).read_bytes()]
    if changed != ["manifest.json"]:
        return False
    try:
        ours, theirs = (json.loads((folder / "manifest.json").read_bytes()) for folder in (newest, sound))
    except ValueError:
        return False
    return bool(ours == theirs)


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Damage one file of the checkpoint in one way; says which and how."""
    file = rng.choice(sorted(checkpoint.iterdir()))
    name = rng.choice(sorted(DAMAGES))
    how = DAMAGES[name](file, rng)
    return f"{file.name} {name}{how}"


def truncate(file: Path, rng: random.Random) -> str:
    size = rng.randrange(file.stat().st_size)
    os.truncate(file, size)
    return f" to {size} bytes"


def flip(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f" at byte {place}, bit {bit}"


def zero_page(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    begin = rng.randrange(0, len(content), PAGE)
    end = min(begin + PAGE, len(content))
    if not any(content[begin:end]):
        return flip(file, rng)
    content[begin:end] = bytes(end - begin)
    file.write_bytes(content)
    return f" from byte {begin}"


def delete(file: Path, _rng: random.Random) -> str:
    file.unlink()
    return ""


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "truncated": truncate,
    "flipped": flip,
    "zeroed": zero_page,
    "deleted": delete,
}


def whole_runs(bench: Bench, template: Path, count: int) -> Row:
    """The same through the command: it prints the reason and ends with the same adapter."""
    row = Row("corruption: runs", "The same, through the command: the reason is printed, the run ends the same.")
    rng = bench.rng("corruption runs")
    for number in range(count):
        with bench.scratch(template) as run:
            newest = run / f"checkpoint-{newest_checkpoint(run)}"
            sound = run.with_name("sound")
            shutil.copytree(newest, sound)
            done = damage(newest, rng)
            matters = not is_harmless(newest, sound)
            problems = bench.to_the_end(run)
            if matters and f"{newest.name} is not used" not in log_of(run).read_text(encoding="utf-8"):
                problems.append("no reason is printed")
            row.add(problems, f"trial {number + 1}, {done}")
    row.worst = f"{row.trials - row.passed} runs differ"
    return row


def all_damaged(bench: Bench, template: Path) -> Row:
    """Every checkpoint damaged: the run starts anew, and what it saves then is not deleted for the damaged ones."""
    row = Row(
        "corruption: all",
        "Every checkpoint damaged: the run starts anew and keeps the checkpoints that it then writes.",
    )
    second = 2 * SAVE_STEPS
    with bench.scratch(template) as run:
        for manifest in run.glob("checkpoint-*/manifest.json"):
            manifest.write_text("{}")
        bench.start(run, before=[CrashAt(run, f".staging-checkpoint-{second}")]).wait()
        problems = bench.to_the_end(run)
        if f"Continuing from checkpoint-{SAVE_STEPS} " not in log_of(run).read_text(encoding="utf-8"):
            problems.append(f"killed after checkpoint-{SAVE_STEPS} had been written, it did not continue from there")
        row.add(problems, f"both checkpoints of a run of {STEPS} steps damaged, killed at step {second}")
    row.worst = f"{row.trials - row.passed} runs lost what they had saved"
    return row
