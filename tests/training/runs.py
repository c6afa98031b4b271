"""A training run over made pairs, without files of text: for tests that compare trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.config.training import TrainingOptions
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import Scorer, choose_scorer
from qlora_dpo.objectives.objective import Objective, make_objective
from qlora_dpo.reference.local import local_reference
from qlora_dpo.training.engine import Engine
from qlora_dpo.training.folder.run_folder import open_run_folder
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.optimizers import make_optimizer, make_scheduler
from qlora_dpo.training.records.tracking import Recorder, read_metrics
from qlora_dpo.training.schedule import Schedule
from qlora_dpo.training.signals import StopFlag

CPU = torch.device("cpu")


class InOrder(Schedule):
    """Step n takes the n-th run of pairs."""

    def step(self, number: int) -> list[int]:
        start = (number - 1) * self.pairs_per_step
        return list(range(start, start + self.pairs_per_step))


def make_training(
    model: Any,
    pairs: Sequence[Any],
    folder: Path,
    *,
    steps: int,
    pairs_per_step: int = 4,
    max_tokens: int = 10_000,
    objective: Objective | None = None,
    scorer: Scorer | None = None,
    in_order: bool = False,
    has_dropout: bool = False,
    **options: Any,
) -> Training:
    values = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 1000, "eval_steps": 1000}
    settings = TrainingOptions(**(values | options))
    scorer = scorer or choose_scorer(model, pairs[0], CPU)
    engine = Engine(
        model,
        scorer,
        objective or make_objective(),
        pairs,
        local_reference(model, scorer),
        CPU,
        max_tokens,
        pairs_per_step,
    )
    optimizer = make_optimizer("auto", trainable_parameters(model), CPU, lr=settings.learning_rate, weight_decay=0.0)
    run = open_run_folder(folder, {"steps": steps}, fresh=False)
    return Training(
        run=run,
        options=settings,
        engine=engine,
        schedule=(InOrder if in_order else Schedule)(range(len(pairs)), pairs_per_step, steps, settings.seed),
        eval_indices=[0, 1],
        optimizer=optimizer,
        scheduler=make_scheduler(
            settings.lr_scheduler_type, optimizer, warmup_ratio=settings.warmup_ratio, total_steps=steps
        ),
        recorder=Recorder(run.metrics, []),
        stop=StopFlag(),
        show_samples=lambda step: None,
        has_dropout=has_dropout,
    )


def run(model: Any, pairs: Sequence[Any], folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Train and return the metrics of every step."""
    training = make_training(model, pairs, folder, **options)
    fit(training)
    return read_metrics(training.run.metrics)


def adapter_weights(model: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainable_parameters(model)]
