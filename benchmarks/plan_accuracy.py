"""The memory that `plan` predicts against the peak of a run, on this machine's CPU.

python benchmarks/plan_accuracy.py        writes benchmarks/results/plan_accuracy.{json,md}

Each case is a process of its own that trains two steps on random ids, as `benchmarks/vs_trl.py` does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import RESULTS, run
from benchmarks.programs import SHAPE, TINY_SHAPE, Task, environment, machine_line, make_model
from benchmarks.run_ours import OurForm, run_ours
from benchmarks.workloads import random_rows

PAIRS, STEPS = 4, 1


@dataclass(frozen=True)
class Case:
    """What is trained; a pair has `tokens` tokens, its prompt once, half of them the answers'."""

    level: Literal["none", "selective", "full"] = "none"
    tokens: int = 384
    rank: int = 64
    vocabulary: int = 32_000

    def __str__(self) -> str:
        return f"{self.level}, {PAIRS} x {self.tokens} tokens, r={self.rank}, vocabulary {self.vocabulary:,}"


CASES = (
    Case(), Case("selective"), Case("full"), Case(tokens=192), Case(rank=256), Case("full", vocabulary=152_000),
)  # fmt: skip
TINY_CASES = (Case(tokens=32, rank=8, vocabulary=256), Case("full", tokens=32, rank=8, vocabulary=256))


def main() -> None:
    """Predict and measure every case; print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="two small cases, for tests; needs --output")
    parser.add_argument("--output", type=Path, help="folder of the results, instead of the repository's own")
    options = parser.parse_args()
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output: its numbers are not to replace the measured ones")
    shape, cases = (TINY_SHAPE, TINY_CASES) if options.tiny else (SHAPE, CASES)
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in {case.vocabulary for case in cases}:
            run(make_model, f"{folder}/{vocabulary}", shape, vocabulary)
        rows = [compare(case, folder) for case in cases]
    results = {"environment": run(environment), "shape": shape, "rows": rows}
    output = options.output or RESULTS
    output.mkdir(parents=True, exist_ok=True)
    (output / "plan_accuracy.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "plan_accuracy.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def compare(case: Case, folder: str) -> dict[str, Any]:
    """GiB that the plan predicts, and the peak."""
    answer = case.tokens // 4
    task = Task(f"{folder}/{case.vocabulary}", f"{folder}/pairs.json", PAIRS, STEPS, rank=case.rank)
    lengths = (case.tokens - 2 * answer, answer, answer)
    Path(task.pairs).write_text(json.dumps(random_rows([lengths] * (task.all_steps * PAIRS), case.vocabulary)))
    predicted = run(predict, task, case.level, lengths)
    found = run(run_ours, task, OurForm(checkpointing=case.level))
    row = {"case": str(case), **asdict(case), "predicted_gib": predicted, "peak_gib": found.peak_gib}
    print(row, file=sys.stderr, flush=True)
    return row


def predict(task: Task, level: str, lengths: tuple[int, int, int]) -> float:
    """GiB that `plan` expects this task to need."""
    import numpy as np

    from qlora_dpo.config.checks import train_config
    from qlora_dpo.config.training import PlanOptions
    from qlora_dpo.training.memory.levels import PairLengths
    from qlora_dpo.training.memory.prediction import GIB, machine_of, plan_memory, skeleton_of

    config = train_config(
        {
            "model_name_or_path": task.model, "use_cpu": True, "lora_r": task.rank, "lora_alpha": task.rank,
            "activation_checkpointing": level, "gradient_accumulation_steps": task.pairs_per_step,
        },
        needs_data=False,
    )  # fmt: skip
    machine = machine_of(config, PlanOptions())
    columns = [np.full(task.pairs_per_step, length) for length in lengths]
    return plan_memory(config, skeleton_of(config, machine), PairLengths(*columns), machine).needed / GIB


def table(results: dict[str, Any]) -> str:
    """A line for each case."""
    shape = results["shape"]
    lines = [
        "# The plan's memory against the measured peak",
        "",
        machine_line(results["environment"]),
        f"LLaMA shape ({shape['hidden_size']} wide, {shape['num_hidden_layers']} layers), NF4, bf16, AdamW in fp32; "
        "resident memory of the whole process. GPU: not measured yet.",
        "",
        "| case | predicted | peak | predicted / peak |",
        "|---|---|---|---|",
    ]
    for row in results["rows"]:
        predicted, peak = row["predicted_gib"], row["peak_gib"]
        lines.append(f"| {row['case']} | {predicted:.2f} GiB | {peak:.2f} GiB | {predicted / peak:.2f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
