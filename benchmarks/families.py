"""Take a tiny model of every family through all commands, and write which of them say yes.

    python benchmarks/families.py [--families NAME ...]

Each family is transformers' own config with random weights. Every command is a process of its own, so that a crash is a
cell of the table. Writes benchmarks/results/families.json and docs/models.md; with --families the other rows stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository

from benchmarks.family_bases import FAMILIES, make  # noqa: E402
from benchmarks.processes import RESULTS, run, start_server  # noqa: E402

DEMO = ROOT / "qlora_dpo" / "demo" / "base"
SECONDS = 300  # of the clock, for one command
PRELOAD = (
    "cli",
    "training.train",
    "training.memory.plan",
    "scoring.score",
    "release.merging.merge",
    "release.checking.check",
    "release.adapter_export",
    "release.gguf.export",
)
_MODEL = "--model_name_or_path base --dataset pairs.jsonl --eval_dataset held_out.jsonl --use_cpu"
_TRAIN = "--output_dir run --lora_r 8 --gradient_accumulation_steps 4 --learning_rate 0.01 --lint off"


@dataclass(frozen=True)
class Stage:
    """A column of the table."""

    command: str
    needs: str | None = None
    """The stage without which there is nothing to ask."""
    leaves: str | None = None
    """What lies in the folder afterwards."""


STAGES = {
    "plan": Stage(f"plan {_MODEL} --max_steps 2"),
    "train": Stage(f"train {_MODEL} {_TRAIN} --max_steps 2", leaves="run/checkpoint-2"),
    "resume": Stage(f"train {_MODEL} {_TRAIN} --max_steps 3 --allow_changed max_steps", "train", "run/checkpoint-3"),
    "score": Stage("score --adapter run --dataset held_out.jsonl --output scores.jsonl", "train", "scores.jsonl"),
    "merge": Stage("merge --adapter run --output merged --use_cpu", "train", "merged/config.json"),
    "check": Stage("release check merged --use_cpu --max_new_tokens 12", "merge"),
    "adapter": Stage("release adapter run --output adapter", "train", "adapter/adapter_model.safetensors"),
    "GGUF": Stage("release gguf merged --output gguf/model.gguf", "merge", "gguf/model.gguf"),
}


def main() -> None:
    """Take every family through; write the results after each one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--tokenizer", type=Path, default=DEMO, help="folder of a tokenizer with a chat template")
    parser.add_argument("--output", type=Path, default=RESULTS / "families.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "models.md")
    options = parser.parse_args()
    start()
    machine, rows = run(environment), {}
    if set(options.families) != set(FAMILIES) and options.output.is_file():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        rows = before["rows"]
        if before["environment"] != machine:
            parser.error(f"{options.output} is of other versions or another machine: leave --families out")
    for family in options.families:
        rows[family] = take_through(family, options.tokenizer)
        print(family, {name: cell["said"] or "yes" for name, cell in rows[family].items()}, flush=True)
        results = {"environment": machine, "rows": {name: rows[name] for name in FAMILIES if name in rows}}
        options.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        options.table.write_text(table(results), encoding="utf-8")


def start() -> None:
    """The server that all processes are forked from; they inherit its variables and its one import of everything."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    start_server(("benchmarks.preload", *(f"qlora_dpo.{name}" for name in PRELOAD)))


def environment() -> dict[str, Any]:
    """Versions and the machine."""
    from qlora_dpo.environment import describe

    return describe()


def take_through(family: str, tokenizer: Path) -> dict[str, dict[str, Any]]:
    """A cell for each stage; a stage that needs another which failed is asked nothing."""
    cells: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        run(make, family, str(tokenizer), name)
        for title, stage in STAGES.items():
            if stage.needs is None or cells[stage.needs]["outcome"] == "yes":
                cells[title] = ask(stage, Path(name)) | of_training(title, Path(name))
            else:
                cells[title] = {"outcome": "not asked", "said": f"needs {stage.needs}", "cpu_seconds": 0.0}
    return cells


def ask(stage: Stage, folder: Path) -> dict[str, Any]:
    """What one command answers: yes, or what it says instead."""
    began = time.perf_counter()
    try:
        code, text, seconds = run(call, stage.command, str(folder))
    except BrokenProcessPool:
        code, text, seconds = 1, "the process was killed", time.perf_counter() - began
    outcome, said = answer(code, text.replace(f"{folder}/", ""))
    if outcome == "yes" and stage.leaves is not None and not (folder / stage.leaves).exists():
        outcome, said = "crashed", f"exit code 0, but no {stage.leaves}"
    return {"outcome": outcome, "said": said, "cpu_seconds": round(seconds, 1)}


def of_training(title: str, folder: Path) -> dict[str, float | None]:
    """How far the merge is from the adapter, as a share of what training changed; None: it changed too little."""
    report = folder / "merged" / "merge_report.json"
    if title != "merge" or not report.is_file():
        return {}
    found = json.loads(report.read_text(encoding="utf-8"))
    return {"kl_of_scale": next(one["kl_of_scale"] for one in found["candidates"] if one["name"] == found["chosen"])}


def answer(code: int, text: str) -> tuple[str, str]:
    """Outcome and sentence of a command that ended with this code after writing this text."""
    if code == 0:
        return "yes", ""
    _, refused, sentence = text.rpartition("error: ")
    if refused and "Traceback (most recent call last)" not in text:
        return "refused", sentence.strip()
    return "crashed", (text.strip() or f"exit code {code}, not a word").splitlines()[-1]


def call(words: str, folder: str) -> tuple[int, str, float]:
    """Run one command in this process, in the folder: exit code, what it wrote, seconds of CPU."""
    os.chdir(folder)
    os.environ["QLORA_DPO_CACHE"] = str(Path(folder) / "cache")
    log = Path("log.txt")
    with log.open("w", encoding="utf-8") as file:  # what libraries' own handlers write, too
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    before = time.process_time()
    code = _exit_code(words.split())
    signal.alarm(0)
    sys.stdout.flush()
    sys.stderr.flush()
    return code, log.read_text(encoding="utf-8", errors="replace"), time.process_time() - before


def _exit_code(words: list[str]) -> int:
    from qlora_dpo.cli import main as command

    try:
        return command(words)
    except BaseException:
        traceback.print_exc()
        return 1


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"longer than {SECONDS} seconds")


def table(results: dict[str, Any]) -> str:
    """docs/models.md."""
    notes: dict[str, int] = {}
    lines = [f"| {' | '.join(['family', *STAGES])} |", f"|---|{'---|' * len(STAGES)}"]
    for family, cells in results["rows"].items():
        shown = [_cell(cells[title], family, notes) for title in STAGES]
        lines.append(f"| {family} | {' | '.join(shown)} |")
    numbered = [f"{number}. {_escaped(note)}" for note, number in notes.items()]
    machine = results["environment"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    whole = sum(all(cell["outcome"] == "yes" for cell in cells.values()) for cells in results["rows"].values())
    trained = sum(cells["train"]["outcome"] == "yes" for cells in results["rows"].values())
    return INTRODUCTION.format(
        families=len(results["rows"]),
        trained=trained,
        whole=whole,
        table="\n".join(lines),
        notes="\n".join(numbered),
        machine=f"{machine['processor']}, {machine['cores']} cores, no GPU; {versions}",
    )


def _cell(cell: dict[str, Any], family: str, notes: dict[str, int]) -> str:
    if cell["outcome"] == "yes":
        if "kl_of_scale" not in cell:
            return "yes"
        share = cell["kl_of_scale"]
        return "yes, too little to measure" if share is None else f"yes, {100 * share:.1f} %"
    if cell["outcome"] == "not asked":
        return "–"
    said = re.sub(rf"\b{family}\b", "FAMILY", cell["said"])
    said = re.sub(r" is a \w+(ForCausalLM|LMHeadModel|Model);", " is a CLASS;", said)
    crashed = cell["outcome"] == "crashed"
    note = textwrap.shorten(("Crashed: " if crashed else "") + said, 400, placeholder=" …")
    number = notes.setdefault(note, len(notes) + 1)
    return f"**crashes** [{number}]" if crashed else f"no [{number}]"


def _escaped(note: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", note)


INTRODUCTION = """# Which models work

A tiny model of each of {families} families, with random weights, goes through every command. {trained} of them train; \
{whole} pass every command, GGUF included. This file is written by a script:

```bash
python benchmarks/families.py
```

| column | the command |
|---|---|
| plan | `plan` |
| train | `train` for 2 steps: DPO, the base in NF4, an adapter of rank 8 on all linear layers \
(of a mixture of experts on those that `train` names) |
| resume | the same command again, to step 3 |
| score | `score` of two held-out pairs |
| merge | `merge`; how far the merged model is from the adapter, in percent of what training changed (KL) |
| check | `release check` of the merged folder against the trained adapter |
| adapter | `release adapter` |
| GGUF | `release gguf` of the merged folder |

**yes**: the command ended with exit code 0 and what it should write is there. **no [n]**: it ended with sentence n \
below the table. **crashes [n]**: a bug; sentence n is the last line of its traceback. **–**: it needs something \
that an earlier command did not write.

The table says that the code knows the family's layers: names, experts, tied heads, file layouts. It says nothing of \
how well a real model of it learns, nor of the GPU path.

{table}

{notes}

Where a sentence says FAMILY or CLASS, the command says the name of the family or of its class in transformers. \
A family that is not in the table has not been tried.

{machine}.
"""


if __name__ == "__main__":
    main()
