"""What the measured programs share: the model, the pairs, the LoRA start and the record of a run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.processes import peak_gib
from benchmarks.workloads import WORKLOADS, Pairs, Row, make_pairs, unshared_tokens

Shape = dict[str, Any]

RANK, LEARNING_RATE = 64, 1e-4
# LLaMA's proportions: 217 M parameters with 32,000 tokens
SHAPE: Shape = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 12, "num_attention_heads": 16}
TINY_SHAPE: Shape = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Task:
    """A model folder, a file of pairs, and how they make steps; the first `warm_up` steps are not counted."""

    model: str
    pairs: str
    pairs_per_step: int
    steps: int
    warm_up: int = 1
    rank: int = RANK

    def rows(self) -> list[Row]:
        """The pairs of all steps."""
        rows: list[Row] = json.loads(Path(self.pairs).read_text(encoding="utf-8"))
        return rows[: self.all_steps * self.pairs_per_step]

    @property
    def all_steps(self) -> int:
        """Steps to train, warm-up included."""
        return self.warm_up + self.steps


@dataclass(frozen=True)
class Run:
    """One run of one program."""

    losses: list[float]
    """Of every step."""
    seconds: list[float]
    """Of every counted step."""
    reference_seconds: float
    """Of the reference's pass over all pairs, where it came before the first step; else 0."""
    loaded_gib: float
    """Peak resident size once the model was loaded."""
    peak_gib: float
    """Peak resident size of the whole run."""
    load_average: float
    """Of the machine at the end."""


def record(task: Task, losses: list[float], stamps: list[float], reference_seconds: float, loaded_gib: float) -> Run:
    """The record of a run whose steps began and ended at `stamps`."""
    seconds = [after - before for before, after in pairwise(stamps)][task.warm_up :]
    return Run(losses, seconds, reference_seconds, loaded_gib, peak_gib(), os.getloadavg()[0])


def load_policy(task: Task) -> Any:
    """The quantized base with the fresh LoRA adapter from which every program starts."""
    import torch

    from qlora_dpo.config.training import ModelOptions, quantization_of
    from qlora_dpo.models.loading import load_base
    from qlora_dpo.models.lora import add_adapter

    base = load_base(task.model, device=torch.device("cpu"), quantization=quantization_of(ModelOptions()))
    return add_adapter(base, r=task.rank, alpha=task.rank, dropout=0.0, target_modules=["all-linear"], seed=0)


def prepare(workload: str, task: Task) -> dict[str, Any]:
    """Write the task's pairs and model; returns what a reader of the results needs to know, of the counted steps."""
    made = make_pairs(workload, task.all_steps * task.pairs_per_step)
    Path(task.pairs).write_text(json.dumps(made.rows), encoding="utf-8")
    counted = Pairs(made.rows[task.warm_up * task.pairs_per_step :], made.source)
    shape = TINY_SHAPE if workload == "tiny" else SHAPE
    vocabulary = WORKLOADS[workload].vocabulary
    return {
        "environment": environment(),
        "workload": workload,
        "source": made.source,
        "mean_lengths": counted.mean_lengths(),
        "unshared_tokens_per_pair": unshared_tokens(counted.rows) / len(counted.rows),
        "vocabulary": vocabulary,
        "shape": shape,
        "parameters": make_model(task.model, shape, vocabulary),
    }


def make_model(folder: str, shape: Shape, vocabulary: int) -> int:
    """Save a LLaMA with random weights in bf16; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=4096, pad_token_id=0, **shape)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return int(model.num_parameters())


def environment() -> dict[str, Any]:
    """Versions, processor and the threads that torch uses here."""
    from importlib.metadata import version

    import torch

    from qlora_dpo.environment import describe

    return {**describe(), "trl": version("trl"), "threads": torch.get_num_threads()}


def machine_line(environment: dict[str, Any]) -> str:
    """The processor and the versions in one line."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "trl")
    versions = ", ".join(f"{name} {environment[name]}" for name in names)
    threads = f"{environment['threads']} threads on {environment['cores']} cores"
    return f"{environment['processor']}, {threads}, no GPU. {versions}."


def pairs_line(prepared: dict[str, Any]) -> str:
    """Where the pairs come from and how long they are, in a few words."""
    means = prepared["mean_lengths"]
    lengths = ", ".join(f"{name.removesuffix('_ids')} {mean}" for name, mean in means.items())
    return f"{prepared['source']}; mean tokens: {lengths}"
