"""Training with the reference's log-probs from a store against computing them in every step, and what reading costs.

python benchmarks/reference_store.py        writes benchmarks/results/reference_store.{json,md}

bf16 on a CPU, the model and the pairs of `vs_trl.py`. Each step is taken both ways, one after the other, from the same
adapter: what else the machine does meanwhile falls on both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import RESULTS, run
from benchmarks.programs import LEARNING_RATE, RANK, Task, load_policy, machine_line, pairs_line, prepare
from benchmarks.run_ours import OurForm, make_engine

if TYPE_CHECKING:
    from qlora_dpo.training.engine import Engine

WORKLOAD, PAIRS_PER_STEP, STEPS = "multi_turn", 4, 12


def main() -> None:
    """Measure; print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model for a few steps; needs --output")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    options = parser.parse_args()
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output, so that it cannot replace real results")
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            f"{folder}/model", f"{folder}/pairs.json", PAIRS_PER_STEP, 3 if options.tiny else STEPS,
            rank=4 if options.tiny else RANK,
        )  # fmt: skip
        prepared = run(prepare, "tiny" if options.tiny else WORKLOAD, task)
        results = prepared | run(measure, task, f"{folder}/store.sqlite")
    output = options.output or RESULTS
    output.mkdir(parents=True, exist_ok=True)
    (output / "reference_store.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (output / "reference_store.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def measure(task: Task, path: str) -> dict[str, Any]:
    """Seconds of every counted step both ways, of the look-ups within it, and of filling the store ahead."""
    import torch

    from qlora_dpo.models.lora import trainable_parameters
    from qlora_dpo.reference.fill import LocalWay, Shard, Way, fill
    from qlora_dpo.reference.store import ModelIdentity, ReferenceStore
    from qlora_dpo.reference.stored import StoredReference
    from qlora_dpo.training.optimizers import make_optimizer

    model = load_policy(task)
    engine = make_engine(task, OurForm(), model)
    inline: Any = engine.reference
    identity = ModelIdentity("0" * 64, {"model": task.model})
    rows: dict[str, list[float]] = {"inline": [], "stored": [], "looked_up": []}
    with ReferenceStore.open(Path(path)) as store:
        started = time.perf_counter()
        compute = LocalWay(inline._score, engine.pairs, kind=engine.scorer.kind, device=engine.device, max_tokens=8192)
        fill(engine.pairs, store.of(identity), Way(identity, compute), Shard())
        filled = time.perf_counter() - started
        stored = Timed(StoredReference(inline._score, engine.pairs, store.of(identity)))
        parameters = trainable_parameters(model)
        optimizer = make_optimizer("auto", parameters, engine.device, lr=LEARNING_RATE, weight_decay=0.0)
        for step in range(task.all_steps):
            indices = range(step * task.pairs_per_step, (step + 1) * task.pairs_per_step)
            for name in ("inline", "stored") if step % 2 else ("stored", "inline"):
                engine.reference = inline.blank() if name == "inline" else stored
                stored.seconds = 0.0
                rows[name].append(seconds_of(engine, indices))
                if name == "stored":
                    rows["looked_up"].append(stored.seconds)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                (optimizer.step if name == "inline" else lambda: None)()
                optimizer.zero_grad(set_to_none=True)
        assert "reference: 0 pairs computed" in stored.reference.summary()
        size = Path(path).stat().st_size
    counted = {name: values[task.warm_up :] for name, values in rows.items()}
    return {"seconds": counted, "filled_seconds": filled, "pairs": len(engine.pairs), "store_bytes": size}


def seconds_of(engine: Engine, indices: Sequence[int]) -> float:
    """Of a step's gradient, as the loop asks for it."""
    started = time.perf_counter()
    engine.reference.unknown(indices)  # what `within_memory` asks before every step
    engine.accumulate_gradient(indices, lambda: None)
    return time.perf_counter() - started


class Timed:
    """A reference that adds up the seconds that its answers take."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference
        self.seconds = 0.0

    def __call__(self, keys: Sequence[int], batch: Any) -> Any:
        return self._timed(self.reference, keys, batch)

    def unknown(self, keys: Sequence[int]) -> Any:
        return self._timed(self.reference.unknown, keys)

    def _timed(self, call: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        answer = call(*arguments)
        self.seconds += time.perf_counter() - started
        return answer


def table(results: dict[str, Any]) -> str:
    """The comparison in a few lines."""
    seconds, steps = results["seconds"], len(results["seconds"]["inline"])
    inline, stored, looked_up = (statistics.median(seconds[name]) for name in ("inline", "stored", "looked_up"))
    faster = [one / other for one, other in zip(seconds["inline"], seconds["stored"], strict=True)]
    share = [one / other for one, other in zip(seconds["looked_up"], seconds["stored"], strict=True)]
    shape = results["shape"]
    return "\n".join([
        "# The reference from a store against the reference in every step",
        "",
        machine_line(results["environment"]),
        f"LLaMA shape of {results['parameters'] / 1e6:.0f} M ({shape['hidden_size']} wide, "
        f"{shape['num_hidden_layers']} layers), NF4 with double quantization, bf16, no activation checkpointing. "
        f"{PAIRS_PER_STEP} pairs a step: {pairs_line(results)}.",
        "",
        "| the reference is | s/step | against computing it |",
        "|---|---|---|",
        f"| computed in the step | {inline:.3g} | |",
        f"| read from the store | {stored:.3g} | {statistics.median(faster):.2f} x faster ({min(faster):.2f} to "
        f"{max(faster):.2f}) |",
        "",
        f"Medians over {steps} steps, each taken both ways; the speed is the median of the steps' own ratios. Looking "
        f"up takes {looked_up * 1e3:.2f} ms of a step, {statistics.median(share):.3%} of it. Filling the store ahead "
        f"took {results['filled_seconds']:.3g} s for {results['pairs']} pairs, and it has "
        f"{results['store_bytes'] / results['pairs']:,.0f} bytes a pair.",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
