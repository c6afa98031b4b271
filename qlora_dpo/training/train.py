"""`train`: the whole run, in reading order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from qlora_dpo import __version__
from qlora_dpo.config.training import TrainConfig, quantization_of
from qlora_dpo.data.template_clock import pinned_date
from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.environment import describe
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.models.activation_checkpointing import set_activation_checkpointing
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import out_of_memory
from qlora_dpo.models.lora import (
    has_dropout,
    save_adapter,
)
from qlora_dpo.models.scoring import choose_scorer
from qlora_dpo.objectives.objective import Objective, make_objective
from qlora_dpo.objectives.supervised import SupervisedObjective
from qlora_dpo.training.data import TrainingData, load_training_data
from qlora_dpo.training.data_record import write_data_record
from qlora_dpo.training.engine import DEFAULT_MAX_TOKENS, Engine
from qlora_dpo.training.folder.checkpoints import disk_errors
from qlora_dpo.training.folder.content import content_of
from qlora_dpo.training.folder.run_folder import (
    CARD,
    CURVES,
    SAMPLES,
    RunFolder,
    default_output_dir,
    held_run_folder,
)
from qlora_dpo.training.linting import lint_training_data
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.memory.device_memory import device_memory
from qlora_dpo.training.memory.levels import levels_of_run
from qlora_dpo.training.optimizers import make_loraplus_optimizer, make_optimizer, make_scheduler
from qlora_dpo.training.parallel.asked import pairs_of_a_step, refuse_unshardable
from qlora_dpo.training.parallel.launching import joined
from qlora_dpo.training.parallel.ranks import ALONE, Ranks
from qlora_dpo.training.parallel.sharding import shard_policy, whole_adapter
from qlora_dpo.training.policy import load_base_config, load_policy, load_training_tokenizer, pair_tokenizer
from qlora_dpo.training.records.curves import draw_curves
from qlora_dpo.training.records.model_card import write_model_card
from qlora_dpo.training.records.trackers import start_trackers
from qlora_dpo.training.records.tracking import Recorder, read_metrics
from qlora_dpo.training.referencing import reference_of_run, refuse_unusable_store
from qlora_dpo.training.row_positions import check_positions
from qlora_dpo.training.row_reference import refuse_row_sums
from qlora_dpo.training.samples import SamplePrinter
from qlora_dpo.training.schedule import make_schedule
from qlora_dpo.training.signals import StopFlag, stop_on_signals

SAMPLE_PROMPTS = 4


@dataclass(frozen=True)
class Trained:
    """A finished run with its model still in memory."""

    run: RunFolder
    model: Any
    tokenizer: Any
    pair_tokenizer: PairTokenizer


def train(config: TrainConfig) -> Trained | None:
    """Train a LoRA adapter on preference pairs or conversations; returns None where the run had finished before.

    Raises:
        QloraDpoError: one of its kinds, each saying what happened, why, and what to do.
    """
    _refuse_inputs(config)
    with joined(config.model.use_cpu) as (ranks, device), open_run(config, ranks) as run:
        return train_in(run, config, device, ranks)


def train_in(run: RunFolder, config: TrainConfig, device: torch.device, ranks: Ranks = ALONE) -> Trained | None:
    """`train` in a folder that is held for it already, as one of its processes."""
    if ranks.on_main(lambda: run.has_nothing_to_do):
        print(f"{run.path} is finished; --fresh starts it anew.", file=sys.stderr)
        return None
    if ranks.is_sharded:
        refuse_unshardable(config, ranks)
    base_config = load_base_config(config.model)
    tokenizer = load_training_tokenizer(config, ranks.on_main(run.chat_template_date))
    data = ranks.main_first(lambda: load_training_data(config.data, tokenizer, config.training.seed))
    print("\n".join(data.summary()), file=sys.stderr)
    lint = lint_training_data(config.data, data, tokenizer) if ranks.is_main else None
    check_positions(base_config, data, config.model.trust_remote_code)
    refuse_row_sums(config, data)
    refuse_unusable_store(config.store.reference_store)
    content = ranks.main_first(lambda: content_of(config, data))
    ranks.refuse_differences(content, "data or a base")
    run = ranks.on_main(lambda: run.with_content(content))
    ranks.on_main(lambda: write_data_record(run.path, data, lint))
    try:
        model = load_policy(config, torch.device("cpu") if ranks.is_sharded else device)
        fuse_lora(model)
        make_lean(model)
        if ranks.is_sharded:
            shard_policy(model, device, ranks)
        scorer = choose_scorer(model, data.pairs[data.train[0]], device)
        ranks.refuse_differences((scorer.kind, scorer.head is None), "a way of scoring")
        set_activation_checkpointing(model, levels_of_run(config, model, scorer.kind, data, device, ranks))
        with (
            reference_of_run(config, model, scorer, data, device, ranks) as reference,
            stop_on_signals(says=ranks.is_main) as stop,
        ):
            engine = Engine(
                model, scorer, objective_of(config), data.pairs, reference, device,
                config.training.max_tokens_per_microbatch or DEFAULT_MAX_TOKENS,
                config.training.per_device_train_batch_size, data.categories(), ranks,
            )  # fmt: skip
            training = prepare(config, run, engine, tokenizer, data, stop)
            with training.recorder:
                fit(training)
    except torch.OutOfMemoryError as error:
        raise out_of_memory("training", device) from error
    weights = whole_adapter(model, ranks)
    ranks.on_main(lambda: finish(config, run, model, tokenizer, data, weights))
    return Trained(run, model, tokenizer, pair_tokenizer(config, tokenizer))


def objective_of(config: TrainConfig) -> Objective | SupervisedObjective:
    """What this run minimizes.

    Raises:
        UsageError: its options do not fit together.
    """
    if config.data.objective == "sft":
        return SupervisedObjective()
    loss = config.loss
    return make_objective(
        loss.loss_type,
        loss.loss_weights or None,
        beta=loss.beta,
        label_smoothing=loss.label_smoothing,
        f_divergence_type=loss.f_divergence_type,
        f_alpha_divergence_coef=loss.f_alpha_divergence_coef,
        discopop_tau=loss.discopop_tau,
        ld_alpha=loss.ld_alpha,
        use_weighting=loss.use_weighting,
        confidence_as=loss.confidence_as,
        simpo_gamma=loss.simpo_gamma,
        cpo_alpha=loss.cpo_alpha,
    )


def _refuse_inputs(config: TrainConfig) -> None:
    """Refuse a run folder that holds what the run reads, which it would write over or, with --fresh, delete."""
    model, data, folder = config.model, config.data, run_path(config)
    for name in (model.model_name_or_path, model.reference_model, data.dataset, data.eval_dataset):
        source = Path(name or "").expanduser()
        if name and source.exists() and source.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"--output_dir {folder} holds {name}, which the run reads. Name another folder.")


def run_path(config: TrainConfig) -> Path:
    """The folder that --output_dir names, or the default one."""
    options = config.training
    return options.output_dir or default_output_dir(str(config.model.model_name_or_path), str(config.data.dataset))


@contextmanager
def open_run(config: TrainConfig, ranks: Ranks = ALONE) -> Iterator[RunFolder]:
    """The folder that --output_dir names, or the default one, held for these processes until the block ends."""
    objective_of(config)  # a wrong option is refused before --fresh deletes anything
    options = config.training
    with ExitStack() as stack:
        held = held_run_folder(
            run_path(config), config.flat(), fresh=options.fresh, allow_changed=options.allow_changed
        )
        yield ranks.on_main(lambda: stack.enter_context(held))


def prepare(
    config: TrainConfig, run: RunFolder, engine: Engine, tokenizer: Any, data: TrainingData, stop: StopFlag
) -> Training:
    """Put optimizer, schedule, records and samples together."""
    options, ranks = config.training, engine.ranks
    pairs_per_step = ranks.on_main(lambda: pairs_of_a_step(config, run, engine))
    schedule = make_schedule(
        data.train,
        pairs_per_step,
        epochs=options.num_train_epochs,
        max_steps=options.max_steps,
        seed=options.seed,
        sampler=data.sampler,
    )
    ranks.on_main(lambda: run.refuse_fewer_steps(schedule.total_steps))
    run_id = ranks.on_main(
        lambda: run.begin(
            total_steps=schedule.total_steps, environment=describe(), pairs_per_step=pairs_per_step,
            processes=ranks.count, chat_template_date=pinned_date(tokenizer),
        )
    )  # fmt: skip
    optimizer = optimizer_of(config, engine)
    prompts = list({tuple(data.pairs[index].prompt_ids): None for index in data.held_out})[:SAMPLE_PROMPTS]
    recorder = recorder_of(config, run, run_id) if ranks.is_main else Recorder(Path(os.devnull), [])
    samples = SamplePrinter(
        engine.model, tokenizer, prompts if options.sample_generate else [], run.path / SAMPLES,
        max_new_tokens=options.max_new_tokens, end_id=pair_tokenizer(config, tokenizer).end_id, pause=stop.check,
        mirror=recorder.show_samples,
    )  # fmt: skip
    return Training(
        run=run,
        options=options,
        engine=engine,
        schedule=schedule,
        eval_indices=data.held_out,
        optimizer=optimizer,
        scheduler=make_scheduler(
            options.lr_scheduler_type,
            optimizer,
            warmup_ratio=options.warmup_ratio,
            total_steps=schedule.total_steps,
        ),
        recorder=recorder,
        stop=stop,
        show_samples=samples,
        has_dropout=has_dropout(engine.model),
        memory=device_memory(engine.device),
    )


def optimizer_of(config: TrainConfig, engine: Engine) -> Optimizer:
    """The optimizer of everything that is trained."""
    options, ratio = config.training, config.lora.loraplus_lr_ratio
    name = "adamw_torch" if engine.ranks.shards_adapter else options.optim
    settings: dict[str, Any] = {
        "lr": options.learning_rate, "betas": (options.adam_beta1, options.adam_beta2), "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay,
    }  # fmt: skip
    if ratio != 1:
        return make_loraplus_optimizer(name, engine.model, engine.device, ratio=ratio, **settings)
    parameters = [parameter for parameter in engine.model.parameters() if parameter.requires_grad]
    return make_optimizer(name, parameters, engine.device, **settings)


def recorder_of(config: TrainConfig, run: RunFolder, run_id: str) -> Recorder:
    """The record of a run with its mirrors."""
    options = config.training
    mirrors = start_trackers(
        options.report_to, run.path, options.run_name or run.path.name, config.flat(), run_id=run_id
    )
    return Recorder(run.metrics, mirrors)


def finish(
    config: TrainConfig, run: RunFolder, model: Any, tokenizer: Any, data: TrainingData,
    weights: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write the adapter (these weights, where those of the model are sharded), the tokenizer, the curves and the card,
    and mark the run finished."""
    try:
        with disk_errors():
            save_adapter(model, run.path, weights)
        tokenizer.save_pretrained(run.path)
        draw_curves(run.metrics, run.path / CURVES, config.data.objective)
        write_model_card(
            run.path / CARD,
            objective=config.data.objective,
            name=run.path.name,
            version=__version__,
            base=str(config.model.model_name_or_path),
            dataset=str(config.data.dataset),
            options=config.flat(),
            quantization=quantization_of(config.model),
            data_summary=data.summary(),
            metrics=read_metrics(run.metrics),
        )
    except OSError as error:
        raise StorageError(
            f"{run.path} cannot be written: {error.strerror or error}. The last checkpoint is safe; make room and run "
            "the same command again."
        ) from error
    run.update_status(status="finished")
    print(f"Adapter, curves and card are in {run.path}.", file=sys.stderr)
