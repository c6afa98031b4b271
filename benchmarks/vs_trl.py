"""Training speed and memory against TRL's DPOTrainer: same pairs, same order, same LoRA start, alternating rounds.

python benchmarks/vs_trl.py --workload multi_turn [--rounds 3] [--steps 2] [--search]

Each program runs in a process of its own, A, B, A, B, ...; the first step of each run warms up and is not counted.
`--search` first tries TRL's forms (batch 1, 2, 4; reference inline or precomputed; checkpointing off or on) for one
round and takes its fastest. Losses are compared. Writes benchmarks/results/vs_trl_WORKLOAD.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
PAIRS_PER_STEP, RANK, LEARNING_RATE = 16, 64, 1e-4
SHAPE = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16}

# (prompt, chosen, rejected): mean tokens of an exponential length distribution, or a fixed length; vocabulary
WORKLOADS: dict[str, dict[str, Any]] = {
    "multi_turn": {"means": (138, 135, 52), "vocabulary": 32_000},
    "belle": {"means": (70, 135, 52), "vocabulary": 32_000},
    "long_prompt": {"fixed": (1000, 200, 200), "vocabulary": 32_000},
    "vocabulary_152k": {"means": (138, 135, 52), "vocabulary": 152_000},
    "tiny": {"means": (20, 12, 8), "vocabulary": 512},
}
OURS = {"ours, reference known": {"known": True}, "ours, first epoch": {"known": False}}
TRL_BEST = {"batch": 1, "precompute": False, "checkpointing": False}


def main() -> None:
    """Measure one workload, print and write its table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", choices=WORKLOADS, default="multi_turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        run_child(json.loads(arguments.child))
        return
    results = measure(arguments.workload, arguments.rounds, arguments.steps, arguments.search)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"vs_trl_{arguments.workload}"
    file.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))


def measure(workload: str, rounds: int, steps: int, search: bool) -> dict[str, Any]:
    """Alternate the programs on one workload; returns every run."""
    from qlora_dpo.environment import describe

    with tempfile.TemporaryDirectory() as folder:
        task = prepare(workload, Path(folder), steps)
        forms = TRL_BEST if not search else search_trl(task)
        programs: dict[str, dict[str, Any]] = {f"TRL 1.16, {describe_form(forms)}": {"program": "trl", **forms}}
        programs |= {name: {"program": "ours", **options} for name, options in OURS.items()}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in programs}
        for number in range(rounds):
            for name, options in programs.items():
                runs[name].append(run_process(task | options))
                print(f"round {number + 1}: {name}: {summary(runs[name][-1])}", file=sys.stderr, flush=True)
    return {"environment": describe(), "workload": workload, **WORKLOADS[workload], "steps": steps, "runs": runs}


def prepare(workload: str, folder: Path, steps: int) -> dict[str, Any]:
    """Make the model (random weights, bf16) and the pairs (random ids of the workload's lengths)."""
    from qlora_dpo.environment import prepare_process

    prepare_process()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = WORKLOADS[workload]
    shape = SHAPE if workload != "tiny" else {key: value // 8 // 64 * 64 or 2 for key, value in SHAPE.items()}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=spec["vocabulary"], max_position_embeddings=4096, pad_token_id=0, **shape)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    generator = random.Random(0)

    def length(position: int) -> int:
        if "fixed" in spec:
            return int(spec["fixed"][position])
        return max(4, min(1024, round(generator.expovariate(1 / spec["means"][position]))))

    def ids(count: int) -> list[int]:
        return [generator.randrange(3, spec["vocabulary"]) for _ in range(count)]

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [{name: ids(length(n)) for n, name in enumerate(names)} for _ in range((steps + 1) * PAIRS_PER_STEP)]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return {"model": str(folder / "model"), "pairs": str(folder / "pairs.json"), "steps": steps + 1}


def search_trl(task: dict[str, Any]) -> dict[str, Any]:
    """TRL's fastest form on this machine and workload."""
    forms = [
        {"batch": batch, "precompute": precompute, "checkpointing": checkpointing}
        for batch in (1, 2, 4)
        for precompute in (False, True)
        for checkpointing in (False, True)
    ]
    measured = []
    for form in forms:
        run = run_process(task | {"program": "trl"} | form)
        measured.append((statistics.median(run["seconds"]), form))
        print(f"TRL {describe_form(form)}: {summary(run)}", file=sys.stderr, flush=True)
    return min(measured, key=lambda row: row[0])[1]


def run_process(task: dict[str, Any]) -> dict[str, Any]:
    """Run one program in a fresh process; its last line of output is its result."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    if result.returncode:
        raise RuntimeError(result.stderr[-3000:])
    found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def run_child(task: dict[str, Any]) -> None:
    """Train as the task says; print the losses and seconds of the steps and the peak memory."""
    from qlora_dpo.environment import prepare_process

    prepare_process()
    losses, stamps, tokens = {"ours": run_ours, "trl": run_trl}[task["program"]](task)
    seconds = [after - before for before, after in pairwise(stamps)][1:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"losses": losses, "seconds": seconds, "peak_gib": peak, "tokens": tokens}))


def policy(task: dict[str, Any]) -> Any:
    """The quantized base with the LoRA adapter that both programs start from."""
    import torch

    from qlora_dpo.config import ModelOptions, quantization_of
    from qlora_dpo.models.loading import load_base
    from qlora_dpo.models.lora import add_adapter

    base = load_base(task["model"], device=torch.device("cpu"), quantization=quantization_of(ModelOptions()))
    return add_adapter(base, r=RANK, alpha=RANK, dropout=0.0, target_modules=["all-linear"], seed=0)


def run_ours(task: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """This tool's engine on the task's pairs."""
    import torch

    from qlora_dpo.data.tokenization import TokenizedPair
    from qlora_dpo.models.activation_checkpointing import set_activation_checkpointing
    from qlora_dpo.models.fused_lora import fuse_lora
    from qlora_dpo.models.lora import trainable_parameters
    from qlora_dpo.models.scoring import choose_scorer
    from qlora_dpo.objectives.objective import make_objective
    from qlora_dpo.training.engine import Engine, local_reference

    device = torch.device("cpu")
    pairs = [TokenizedPair(**row) for row in json.loads(Path(task["pairs"]).read_text())]
    model = policy(task)
    fuse_lora(model)
    scorer = choose_scorer(model, pairs[0], device)
    set_activation_checkpointing(model, "none")
    reference = local_reference(model, scorer)
    engine = Engine(model, scorer, make_objective(), pairs, reference, device, 4096, PAIRS_PER_STEP)
    if task["known"]:
        engine.evaluate(range(len(pairs)), lambda: None)
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses, stamps = [], [time.perf_counter()]
    for step in range(task["steps"]):
        indices = range(step * PAIRS_PER_STEP, (step + 1) * PAIRS_PER_STEP)
        losses.append(engine.accumulate_gradient(indices, lambda: None)["loss"])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamps.append(time.perf_counter())
    return losses, stamps, engine.tokens(range(PAIRS_PER_STEP, len(pairs)))


def run_trl(task: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """TRL's trainer on the same token ids in the same order."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class OnTokenIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.stamps = self.stamps or [time.perf_counter()]

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.stamps.append(time.perf_counter())

    rows = json.loads(Path(task["pairs"]).read_text())
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = OnTokenIds(
            model=policy(task),
            args=DPOConfig(
                output_dir=folder,
                max_steps=task["steps"],
                per_device_train_batch_size=task["batch"],
                gradient_accumulation_steps=PAIRS_PER_STEP // task["batch"],
                precompute_ref_log_probs=task["precompute"],
                gradient_checkpointing=task["checkpointing"],
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                weight_decay=0.0,
                logging_steps=1,
                max_length=4096,
                report_to="none",
                use_cpu=True,
                bf16=False,
                save_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
            callbacks=[clock],
        )
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    counted = rows[PAIRS_PER_STEP:]
    tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in counted)
    return losses, clock.stamps, tokens


def describe_form(form: dict[str, Any]) -> str:
    """`batch 1, reference inline, no checkpointing`."""
    reference = "reference precomputed" if form["precompute"] else "reference inline"
    return f"batch {form['batch']}, {reference}, {'' if form['checkpointing'] else 'no '}checkpointing"


def summary(run: dict[str, Any]) -> str:
    """One run in a few words."""
    return f"{statistics.median(run['seconds']):.1f} s/step, {run['peak_gib']:.2f} GiB"


def markdown(results: dict[str, Any]) -> str:
    """The table: medians over all counted steps of all rounds, spread, ratio to TRL."""
    machine = results["environment"]
    counted = {name: [s for run in runs for s in run["seconds"]] for name, runs in results["runs"].items()}
    medians = {name: statistics.median(seconds) for name, seconds in counted.items()}
    trl = next(iter(medians.values()))
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    lines = [
        f"# Against TRL: {results['workload']}",
        "",
        f"{machine['processor']}, {machine['cores']} cores, no GPU. {versions}, trl 1.16.0. LLaMA shape "
        f"({SHAPE['hidden_size']} wide, {SHAPE['num_hidden_layers']} layers), NF4 with double quantization, bf16, "
        f"r={RANK} on all linear layers, {PAIRS_PER_STEP} pairs a step, no activation checkpointing in ours.",
        "",
        "| program | s/step (median, spread) | pairs/s | against TRL | peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        spread = f"{min(counted[name]):.1f} to {max(counted[name]):.1f}"
        peak = max(run["peak_gib"] for run in runs)
        lines.append(
            f"| {name} | {medians[name]:.1f} ({spread}) | {PAIRS_PER_STEP / medians[name]:.2f} "
            f"| {trl / medians[name]:.2f} x | {peak:.2f} GiB |"
        )
    every = [run["losses"] for runs in results["runs"].values() for run in runs]
    difference = max(abs(a - b) for losses in every for a, b in zip(losses, every[0], strict=True))
    return "\n".join([*lines, "", f"Largest difference of a step's loss between any two runs: {difference:.1e}.", ""])


if __name__ == "__main__":
    main()
