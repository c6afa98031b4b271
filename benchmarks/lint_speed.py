"""Measure `data lint` and `data inspect` on 100,000 preference pairs, and what the lint adds to a start of `train`.

    python benchmarks/lint_speed.py [--rows 100000] [--llama_tokenizer FOLDER]

Writes benchmarks/results/lint_speed.json and .md. Each run is a process of its own, so that its peak is its own. The
cache of tokenized pairs is empty before the first run of each command.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository

from benchmarks.data_speed import LLAMA_TOKENIZER, RESULTS, llama, machine_with, write_pairs  # noqa: E402

LIMITS = {"seconds": 120.0, "peak_gb": 2.0, "added_to_cached_start_seconds": 2.0}
RUNS = {
    "lint, first": ("lint", "a"),
    "lint, tokens from the cache": ("lint", "a"),
    "lint without a tokenizer": ("lint_texts", "b"),
    "inspect, first": ("inspect", "c"),
    "inspect, tokens from the cache": ("inspect", "c"),
    "start of train, first": ("start", "d"),
    "start of train, all from the cache": ("start", "d"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--llama_tokenizer", type=Path, default=LLAMA_TOKENIZER)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "pairs.jsonl"
        write_pairs(data, options.rows)
        tokenizer = llama(folder / "llama", options.llama_tokenizer)
        runs = {title: run(what, data, tokenizer, folder / cache) for title, (what, cache) in RUNS.items()}
        write_results(options.rows, data.stat().st_size, runs)


def run(what: str, data: Path, tokenizer: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", what, str(data), str(tokenizer)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "QLORA_DPO_CACHE": str(cache)}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def measure(what: str, data: str, tokenizer: str) -> dict[str, Any]:
    """Run in this process; seconds are those of the command with its imports, the peak is of the whole process."""
    start, cpu_start = time.perf_counter(), time.process_time()
    parts = start_training(data, tokenizer) if what == "start" else command(what, data, tokenizer)
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu_start, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "load_average": round(os.getloadavg()[0], 1),
        **parts,
    }


def command(what: str, data: str, tokenizer: str) -> dict[str, Any]:
    from qlora_dpo.cli import main as run_command

    words = ["data", what.partition("_")[0], data]
    code = run_command(words if what == "lint_texts" else [*words, "--tokenizer", tokenizer])
    return {"exit_code": code}


def start_training(data: str, tokenizer_folder: str) -> dict[str, Any]:
    """Load the pairs as `train` does, then its lint, which alone is measured as `lint_seconds`."""
    from transformers import AutoTokenizer

    from qlora_dpo.config.training import DataOptions
    from qlora_dpo.training.data import load_training_data
    from qlora_dpo.training.linting import lint_training_data

    options = DataOptions(dataset=data)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    pairs = load_training_data(options, tokenizer, seed=0)
    start = time.perf_counter()
    lint_training_data(options, pairs, tokenizer)
    return {"lint_seconds": round(time.perf_counter() - start, 2)}


def write_results(rows: int, file_bytes: int, runs: dict[str, dict[str, Any]]) -> None:
    machine = machine_with("transformers", "tokenizers", "rensa", "py3langid", "numpy")
    result = {"rows": rows, "file_bytes": file_bytes, "machine": machine, "limits": LIMITS, "runs": runs}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "lint_speed.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# Lint and inspection of preference pairs",
        "",
        f"{rows:,} synthetic hh-rlhf pairs, {file_bytes / 1e6:,.0f} MB of JSON Lines, LLaMA's SentencePiece tokenizer. "
        f"{machine['cpu']}, {machine['cores']} cores. Python {machine['python']}, "
        + ", ".join(f"{name} {machine[name]}" for name in ("tokenizers", "rensa", "py3langid", "numpy"))
        + ".",
        "",
        "| run | time | of it the lint | CPU time | peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {title} | {found['seconds']:.1f} s | {lint_share(found)} | {found['cpu_seconds']:.1f} s "
        f"| {found['peak_gb']:.2f} GB |"
        for title, found in runs.items()
    ]
    load = max(found["load_average"] for found in runs.values())
    lines += [
        "",
        f"Load average of the machine meanwhile: {load:.1f} (where it is above the number of cores, "
        "other work took its share).",
        "Times are those of whole commands in a process of their own, imports and tokenization included; memory is the "
        "peak resident size. `python benchmarks/lint_speed.py` measures again.",
    ]
    (RESULTS / "lint_speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def lint_share(found: dict[str, Any]) -> str:
    return f"{found['lint_seconds']:.2f} s" if "lint_seconds" in found else ""


if __name__ == "__main__":
    main()
