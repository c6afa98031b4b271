"""How long a user waits before anything happens: --help, and loading 200 M parameters to NF4 on the CPU.

python benchmarks/startup.py        writes benchmarks/results/startup.{json,md}
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 5
COMMANDS = ("qlora_dpo train", "qlora_dpo merge", "qlora_dpo env", "eval app")
LIMITS = {"help": 1.0, "load": 20.0}
# LLaMA's proportions at 207 M parameters
SHAPE = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16}

LOAD = """
import sys, time, resource
from qlora_dpo.environment import prepare_process
prepare_process()
import torch
from qlora_dpo.config.training import ModelOptions, quantization_of
from qlora_dpo.models.loading import load_base
started = time.perf_counter()
model = load_base(sys.argv[1], device=torch.device("cpu"), quantization=quantization_of(ModelOptions()))
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def main() -> None:
    """Measure, print and write both tables."""
    from qlora_dpo.environment import describe

    results: dict[str, Any] = {"environment": describe(), "limits": LIMITS, "help_seconds": {}}
    for command in COMMANDS:
        results["help_seconds"][command] = [seconds_of_help(command) for _ in range(ROUNDS)]
    with tempfile.TemporaryDirectory() as folder:
        results["parameters"] = make_model(Path(folder))
        measured = [load(folder) for _ in range(ROUNDS)]
    results["load_seconds"] = [row[0] for row in measured]
    results["load_peak_gib"] = max(row[1] for row in measured)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "startup.md").write_text(markdown(results))
    print(markdown(results))


def seconds_of_help(command: str) -> float:
    """Wall time of `python -m COMMAND --help`, start of Python included."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command.split(), "--help"], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def make_model(folder: Path) -> int:
    """Save a random LLaMA in bf16; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, **SHAPE)).bfloat16()
    model.save_pretrained(folder)
    return int(model.num_parameters())


def load(folder: str) -> tuple[float, float]:
    """(seconds, peak GiB) of loading to NF4 with double quantization in a process of its own."""
    result = subprocess.run([sys.executable, "-c", LOAD, folder], cwd=ROOT, check=True, capture_output=True, text=True)
    seconds, peak = result.stdout.split()
    return float(seconds), float(peak)


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    machine = results["environment"]
    lines = [
        "# Start-up",
        "",
        f"{machine['processor']}, {machine['cores']} cores. Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, bitsandbytes {machine['bitsandbytes']}. {ROUNDS} rounds each.",
        "",
        "| what | median | spread | limit |",
        "|---|---|---|---|",
    ]
    for command, seconds in results["help_seconds"].items():
        lines.append(row(f"`python -m {command} --help`", seconds, LIMITS["help"]))
    lines.append(
        row(f"load {results['parameters'] / 1e6:.0f} M parameters to NF4", results["load_seconds"], LIMITS["load"])
    )
    return "\n".join([*lines, "", f"Peak memory of loading: {results['load_peak_gib']:.2f} GiB.", ""])


def row(what: str, seconds: list[float], limit: float) -> str:
    """A line of the table."""
    return (
        f"| {what} | {statistics.median(seconds):.2f} s | {min(seconds):.2f} to {max(seconds):.2f} s | {limit:.0f} s |"
    )


if __name__ == "__main__":
    main()
