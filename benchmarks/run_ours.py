"""This tool's engine on a task: what `train` does between two checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.processes import peak_gib
from benchmarks.programs import LEARNING_RATE, Run, Task, load_policy, record

if TYPE_CHECKING:
    from qlora_dpo.models.activation_checkpointing import Level
    from qlora_dpo.training.engine import Engine


@dataclass(frozen=True)
class OurForm:
    """How the engine is set."""

    reference_known: bool = True
    """The reference's log-probs are there before the first step, as from a store; else a first epoch."""
    checkpointing: Level = "none"
    max_tokens: int = 2048
    plain: bool = False
    """Instead of the engine's own way: PEFT's forward on padded rows, the model's own logits."""

    def __str__(self) -> str:
        words = ["reference known" if self.reference_known else "first epoch"]
        words += [f"{self.checkpointing} checkpointing"] if self.checkpointing != "none" else []
        words += ["PEFT's forward on padded rows"] if self.plain else []
        return f"ours, {', '.join(words)}"


def run_ours(task: Task, form: OurForm) -> Run:
    """Train on the task's pairs in their order."""
    import torch

    from qlora_dpo.models.lora import trainable_parameters
    from qlora_dpo.training.optimizers import make_optimizer

    model = load_policy(task)
    loaded_gib = peak_gib()
    engine = make_engine(task, form, model)
    reference_seconds = fill_reference(engine) if form.reference_known else 0.0
    parameters = trainable_parameters(model)
    optimizer = make_optimizer("auto", parameters, engine.device, lr=LEARNING_RATE, weight_decay=0.0)
    losses, stamps = [], [time.perf_counter()]
    for step in range(task.all_steps):
        indices = range(step * task.pairs_per_step, (step + 1) * task.pairs_per_step)
        losses.append(engine.accumulate_gradient(indices, lambda: None)["loss"])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stamps.append(time.perf_counter())
    return record(task, losses, stamps, reference_seconds, loaded_gib)


def make_engine(task: Task, form: OurForm, model: Any) -> Engine:
    """The engine as `train` makes it."""
    import torch

    from qlora_dpo.data.tokenization import TokenizedPair
    from qlora_dpo.models.activation_checkpointing import set_activation_checkpointing
    from qlora_dpo.models.fused_lora import fuse_lora
    from qlora_dpo.models.lean_layers import make_lean
    from qlora_dpo.models.scoring import Scorer, choose_scorer
    from qlora_dpo.objectives.objective import make_objective
    from qlora_dpo.reference.local import local_reference
    from qlora_dpo.training.engine import Engine

    device = torch.device("cpu")
    pairs = [TokenizedPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in task.rows()]
    if form.plain:
        scorer = Scorer("padded", None)
    else:
        fuse_lora(model)
        make_lean(model)
        scorer = choose_scorer(model, pairs[0], device)
    set_activation_checkpointing(model, form.checkpointing)
    return Engine(
        model=model,
        scorer=scorer,
        objective=make_objective(),
        pairs=pairs,
        reference=local_reference(model, scorer),
        device=device,
        max_tokens=form.max_tokens,
        group=task.pairs_per_step,
    )


def fill_reference(engine: Engine) -> float:
    """Score every pair with the reference, which the engine then remembers; returns the seconds."""
    from qlora_dpo.data.packing import pack

    started = time.perf_counter()
    for members in engine.micro_batches(range(len(engine.pairs))):
        engine.reference(members, pack([engine.pairs[index] for index in members], engine.scorer.kind))
    return time.perf_counter() - started
