"""Where the time of a training step goes, by torch's profiler on this machine's CPU.

python benchmarks/profile_step.py        writes benchmarks/results/profile_step.{json,md}

The model and the pairs are those of `vs_trl.py`: 4 multi-turn pairs a step, the reference known. The first step warms
up, the second is timed as it is, the third is profiled. Every operation counts with its own time, without those it
calls.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import RESULTS, run
from benchmarks.programs import LEARNING_RATE, Task, load_policy, machine_line, pairs_line, prepare
from benchmarks.run_ours import OurForm, fill_reference, make_engine

PAIRS, SHOWN = 4, 12
CLIPPING = "clip_grad_norm"
BASE, ADAPTER, REST = "matrix products of the base", "the adapter: its products and casts", "the rest"
# What an operation belongs to, by the beginning of its name or of one that it runs within; the first that fits.
WITHIN = {
    "head and log-probs": ("_TokenLogps",),
    "optimizer and clipping": ("Optimizer.step", CLIPPING),
    "dequantization": ("bitsandbytes::dequantize",),
    "attention": ("_FlashOnCpu", "_GatherRows", "aten::_scaled_dot_product", "aten::scaled_dot_product"),
    "norms": ("_RMSNorm",),
    "positions": ("_Rotate",),
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
# By its own name alone, outside of all these.
ALONE = {
    "elementwise: SwiGLU, residuals": ("aten::silu", "aten::mul", "aten::add", "aten::sigmoid"),
    "copies": ("aten::copy_", "aten::clone", "aten::cat", "aten::index", "aten::fill_", "aten::zero_"),
}
PARTS = (BASE, ADAPTER, *WITHIN, *ALONE, REST)


def main() -> None:
    """Profile a step; print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, for tests; needs --output")
    parser.add_argument("--output", type=Path, help="folder of the results, instead of the repository's own")
    options = parser.parse_args()
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output: its numbers are not to replace the measured ones")
    with tempfile.TemporaryDirectory() as folder:
        task = Task(f"{folder}/model", f"{folder}/pairs.json", PAIRS, steps=2)
        head = run(prepare, "tiny" if options.tiny else "multi_turn", task)
        results = head | run(profile_step, task)
    output = options.output or RESULTS
    output.mkdir(parents=True, exist_ok=True)
    (output / "profile_step.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "profile_step.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def profile_step(task: Task) -> dict[str, Any]:
    """Seconds of a step, and of every part of a profiled one."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from qlora_dpo.models.lora import trainable_parameters
    from qlora_dpo.training.optimizers import make_optimizer

    model = load_policy(task)
    engine = make_engine(task, OurForm(), model)
    fill_reference(engine)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer("auto", parameters, engine.device, lr=LEARNING_RATE, weight_decay=0.0)

    def step(number: int) -> float:
        started = time.perf_counter()
        pairs = range(number * task.pairs_per_step, (number + 1) * task.pairs_per_step)
        engine.accumulate_gradient(pairs, lambda: None)
        with record_function(CLIPPING):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    step(0)
    plain = step(1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        profiled = step(2)
    parts: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    for event in profiler.events() or []:
        seconds = event.self_cpu_time_total / 1e6
        parts[part_of(event, task.rank)] += seconds
        operations[event.name] += seconds
    return {
        "seconds": plain,
        "profiled_seconds": profiled,
        "load_average": os.getloadavg()[0],
        "micro_batches": len(engine.micro_batches(range(2 * task.pairs_per_step, 3 * task.pairs_per_step))),
        "parts": {part: parts[part] for part in PARTS},
        "operations": dict(operations.most_common(SHOWN)),
    }


def part_of(event: Any, rank: int) -> str:
    """The part of a step that an operation belongs to."""
    names = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    for part, within in WITHIN.items():
        if any(name.startswith(within) for name in names):
            return part
    is_product = event.name.startswith(PRODUCTS)
    if any(name.startswith("_LoraLinear") for name in names):
        # Of the products in a layer with an adapter, the adapter's have its rank as one of their sizes.
        of_base = is_product and rank not in sizes(event.input_shapes)
        return BASE if of_base or any(name.startswith("bitsandbytes::gemm_4bit") for name in names) else ADAPTER
    if is_product:
        return BASE
    return next((part for part, own in ALONE.items() if event.name.startswith(own)), REST)


def sizes(shapes: Sequence[Sequence[int]]) -> set[int]:
    """Every size of an operation's inputs."""
    return {size for shape in shapes or () for size in shape}


def table(results: dict[str, Any]) -> str:
    """A line for each part, the largest first, and the operations that take most."""
    parts: dict[str, float] = results["parts"]
    total = sum(parts.values())
    shape = results["shape"]
    lines = [
        "# Where the time of a step goes",
        "",
        machine_line(results["environment"]),
        f"LLaMA shape ({shape['hidden_size']} wide, {shape['num_hidden_layers']} layers, vocabulary "
        f"{results['vocabulary']:,}), NF4, bf16, the reference known. {PAIRS} pairs "
        f"(micro-batches: {results['micro_batches']}); {pairs_line(results)}.",
        "",
        f"A step takes {results['seconds']:.2f} s, with the profiler {results['profiled_seconds']:.2f} s; load average "
        f"{results['load_average']:.1f}. Other programs on the machine lengthen everything.",
        "",
        "| part | seconds | share |",
        "|---|---|---|",
        *(
            f"| {part} | {seconds:.3f} | {seconds / total:.1%} |"
            for part, seconds in sorted(parts.items(), key=lambda item: -item[1])
        ),
        f"| all that the profiler saw | {total:.3f} | 100% |",
        "",
        "| operation, wherever it is called | seconds |",
        "|---|---|",
        *(f"| `{name}` | {seconds:.3f} |" for name, seconds in results["operations"].items()),
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
