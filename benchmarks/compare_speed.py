"""Measure `eval compare`: 300 prompts x 2 answers on the demo base, in batches and one prompt at a time.

    python benchmarks/compare_speed.py [--adapter runs/demo] [--tiny]

Writes benchmarks/results/compare_speed.json and .md (not with --tiny, which is a test of this script: 8 short answers
of an untrained adapter). Without --adapter the demo is trained first. Each run is a process of its own; its seconds are
those of the whole command, from the start of Python to the last number.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository

from benchmarks.data_speed import RESULTS, processor  # noqa: E402

LIMITS = {"seconds": 60.0, "times_one_by_one": 3.0}
PROMPTS, LONGEST, BATCH = 300, 64, 64
TINY = (8, 4, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    count, longest, batch = TINY if options.tiny else (PROMPTS, LONGEST, BATCH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = options.adapter or (untrained(folder) if options.tiny else trained(folder))
        prompts = write_prompts(folder / "prompts.jsonl", count)
        runs = {
            title: run(adapter, prompts, folder / str(size), longest, size)
            for title, size in {f"batches of {batch}": batch, "one by one": 1}.items()
        }
    results = {"prompts": count, "longest_answer": longest, "processor": processor(), "limits": LIMITS, "runs": runs}
    print(markdown(results))
    if not options.tiny:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "compare_speed.json").write_text(json.dumps(results, indent=2) + "\n")
        (RESULTS / "compare_speed.md").write_text(markdown(results))


def run(adapter: Path, prompts: Path, output: Path, longest: int, batch: int) -> dict[str, Any]:
    """One comparison, without answers drawn for the divergence."""
    started, load = time.perf_counter(), os.getloadavg()[0]
    command(
        "eval", "compare", "--adapter", adapter, "--prompts", prompts, "--output", output, "--use_cpu", "true",
        "--max_new_tokens", longest, "--batch_size", batch, "--kl_samples", 0,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    tokens = sum(summary["rates"][side]["mean_tokens"] for side in ("before", "after")) * summary["prompts"]
    return {
        "seconds": round(seconds, 1),
        "writing_seconds": round(summary["seconds"], 1),
        "answers": 2 * summary["prompts"],
        "tokens": round(tokens),
        "load_average": round(load, 1),
    }


def write_prompts(file: Path, count: int) -> Path:
    """Questions of the demo's world."""
    from qlora_dpo.demo.world import held_out_questions, training_questions

    questions = [*held_out_questions(), *training_questions()][:count]
    rows = [{"prompt": one.prompt, "reference_answer": one.explained, "category": one.category} for one in questions]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def trained(folder: Path) -> Path:
    """The adapter of the demo."""
    command("qlora_dpo", "train", "--output_dir", folder / "demo")
    return folder / "demo"


def untrained(folder: Path) -> Path:
    """An adapter that changes nothing."""
    import torch

    from qlora_dpo.demo.base_model import BASE
    from qlora_dpo.models.loading import load_base
    from qlora_dpo.models.lora import add_adapter, save_adapter

    base = load_base(str(BASE), device=torch.device("cpu"), quantization=None, dtype=torch.float32)
    adapter = folder / "adapter"
    adapter.mkdir()
    save_adapter(add_adapter(base, r=4, alpha=8, dropout=0.0, target_modules=["all-linear"], seed=0), adapter)
    return adapter


def command(program: str, *words: object) -> None:
    """Run a command of this repository; what it prints is shown only where it fails."""
    found = subprocess.run(
        [sys.executable, "-m", program, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode:
        sys.exit(f"{program} {words[0]} ended with {found.returncode}:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")


def markdown(results: dict[str, Any]) -> str:
    """The table, with what the batches must reach."""
    batched, alone = results["runs"].values()
    limits = results["limits"]
    lines = [
        f"# Comparing {results['prompts']} prompts before and after, on the demo's base",
        "",
        f"{results['processor']}. Answers of up to {results['longest_answer']} tokens, with their log-probs under both",
        "models, verdicts and statistics.",
        "",
        "| prompts at once | whole command, s | writing answers, s | answers | tokens | load average before |",
        "|---|---|---|---|---|---|",
    ]
    for title, found in results["runs"].items():
        lines.append(
            f"| {title} | {found['seconds']} | {found['writing_seconds']} | {found['answers']} | {found['tokens']} | "
            f"{found['load_average']} |"
        )
    lines += [
        "",
        f"The whole command: {alone['seconds'] / batched['seconds']:.1f} times as fast as one by one, writing alone "
        f"{alone['writing_seconds'] / max(batched['writing_seconds'], 0.1):.1f} times (limit: "
        f"{limits['times_one_by_one']:g} times, {limits['seconds']:g} s).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
