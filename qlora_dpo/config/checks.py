"""From flat options to a checked configuration: what cannot work, and what would be ignored, is refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from qlora_dpo.config.labeling import EndpointOptions, refuse_ignored
from qlora_dpo.config.reference import (
    FillOptions,
    RayOptions,
    ScoreOptions,
    ServedOptions,
    StoreOptions,
    StoreVerifyOptions,
)
from qlora_dpo.config.training import TRAIN_GROUPS, LoraOptions, LossOptions, PlanOptions, TrainConfig, uses_4bit
from qlora_dpo.errors import UsageError


def train_config(options: dict[str, Any], needs_data: bool = True) -> TrainConfig:
    """Build a checked `TrainConfig` from flat options.

    Raises:
        UsageError: naming every option that cannot work or would be ignored.
    """
    groups = {
        name: group(**{option.name: options[option.name] for option in fields(group) if option.name in options})
        for name, group in TRAIN_GROUPS.items()
    }
    config = TrainConfig(**groups)
    problems = [*_impossible(config, needs_data), *_unknown_names(config), *_ignored(config)]
    if problems:
        raise UsageError("\n".join(problems))
    return config


def plan_config(options: dict[str, Any]) -> tuple[TrainConfig, PlanOptions]:
    """Build the checked options of `plan`: those of the run, whose --dataset may be left out, and its own.

    Raises:
        UsageError: naming every option that cannot work or would be ignored.
    """
    if options["model_name_or_path"] is None:
        raise UsageError("plan needs --model_name_or_path: name a local model folder or a Hub id.")
    own = PlanOptions(**{option.name: options[option.name] for option in fields(PlanOptions)})
    for option in fields(own):
        value = getattr(own, option.name)
        if value is not None and value <= 0:
            raise UsageError(f"--{option.name} {value}: must be above 0.")
    config = train_config(options, needs_data=False)
    if config.data.dataset is None and own.gpu_price_per_hour is not None:
        raise UsageError("--gpu_price_per_hour would be ignored: without --dataset there are no hours to pay for.")
    if config.model.use_cpu and own.gpu_memory is not None:
        raise UsageError("--gpu_memory would be ignored: --use_cpu plans for the CPU. Leave one of them out.")
    return config, own


def fill_config(
    options: dict[str, Any],
) -> tuple[TrainConfig, FillOptions, EndpointOptions, ServedOptions, RayOptions]:
    """Build the checked options of `reference`: the model and the data as in `train`, and its own.

    Raises:
        UsageError: naming every option that cannot work or would be ignored.
    """
    for name in ("model_name_or_path", "dataset"):
        if options[name] is None:
            raise UsageError(f"reference needs --{name}: a model computes the log-probs of a dataset's pairs.")
    if options["objective"] == "sft":
        raise UsageError("--objective sft has no reference: leave it out.")
    config = train_config({name: value for name, value in options.items() if name != "max_drift"})
    own, server, served = (_filled(group, options) for group in (FillOptions, EndpointOptions, ServedOptions))
    if not server.endpoint:
        refuse_ignored(server, "there is no --endpoint")
        refuse_ignored(served, "there is no --endpoint")
    else:
        refuse_ignored(own, "the server at --endpoint cuts its own batches", "max_tokens_per_microbatch")
    if not served.verify:
        refuse_ignored(served, "--verify 0 compares nothing", "max_drift")
    for name in ("verify", "max_drift"):
        if (getattr(served, name) or 0) < 0:
            raise UsageError(f"--{name} {getattr(served, name)}: must be at least 0.")
    return config, own, server, served, ray_options(options)


def ray_options(options: dict[str, Any]) -> RayOptions:
    """Build the checked options of --engine.

    Raises:
        UsageError: naming every option that cannot work or would be ignored.
    """
    ray: RayOptions = _filled(RayOptions, options)
    if ray.engine == "local":
        refuse_ignored(ray, "--engine local has no workers")
    if ray.ray_workers is not None and ray.ray_workers < 1:
        raise UsageError(f"--ray_workers {ray.ray_workers}: must be above 0.")
    if (ray.ray_address or "").startswith("ray://"):
        raise UsageError(
            f"--ray_address {ray.ray_address}: the command itself runs in the cluster. Start it on one of its machines "
            "(`ray job submit` does), with the address of the head, such as 10.0.0.1:6379, or without one."
        )
    return ray


def _filled(group: type, options: dict[str, Any]) -> Any:
    return group(**{option.name: options[option.name] for option in fields(group)})


def verify_config(options: dict[str, Any]) -> tuple[TrainConfig, StoreVerifyOptions]:
    """Build the checked options of `reference verify`, whose model and data may be left out.

    Raises:
        UsageError: naming every option that cannot work or would be ignored.
    """
    own = StoreVerifyOptions(**{option.name: options[option.name] for option in fields(StoreVerifyOptions)})
    config = train_config({name: value for name, value in options.items() if name != "max_drift"})
    defaults = StoreVerifyOptions(own.store)
    if own.verify < 1:
        raise UsageError(f"--verify {own.verify}: must be above 0.")
    if config.data.objective == "sft":
        raise UsageError("--objective sft has no reference: leave it out.")
    for name in ("verify", "max_drift") if config.is_demo else ():
        if getattr(own, name) != getattr(defaults, name):
            raise UsageError(f"--{name} would be ignored: name --model_name_or_path and --dataset to compute again.")
    return config, own


def score_config(options: dict[str, Any]) -> tuple[TrainConfig, ScoreOptions, RayOptions]:
    """Build the checked options of `score`: the model and the data as in `train`, and its own.

    Raises:
        UsageError: naming every option that cannot work or would be ignored.
    """
    own: ScoreOptions = _filled(ScoreOptions, options)
    if options["dataset"] is None:
        raise UsageError("score needs --dataset: name a file, a folder or a Hub id of pairs.")
    if options["model_name_or_path"] is None:
        named = "--adapter none" if own.adapter == "none" else f"--adapter {own.adapter} names no base, so score"
        raise UsageError(f"{named} needs --model_name_or_path: a local model folder or a Hub id.")
    if options["objective"] == "sft":
        raise UsageError("--objective sft has no pairs to score: leave it out.")
    if own.worst is not None and own.worst < 1:
        raise UsageError(f"--worst {own.worst}: must be above 0.")
    if own.adapter == "none":
        refuse_ignored(own, "--adapter none gives no rewards", "beta")
    config = train_config(options)
    refuse_ignored(config.data, "score takes every pair of --dataset", *_OF_HOLDING_OUT)
    return config, own, ray_options(options)


# Options of `train` that divide a data set, or look for what is wrong with it.
_OF_HOLDING_OUT = ("eval_dataset", "eval_split", "eval_fraction", "max_train_samples", "max_eval_samples", "lint")


def _impossible(config: TrainConfig, needs_data: bool) -> list[str]:
    """Options whose values cannot work, one sentence each."""
    model, data, training = config.model, config.data, config.training
    problems = [
        f"--{name} {value}: must be above 0."
        for name, value in config.items()
        if name in _POSITIVE and value is not None and value <= 0
    ]
    if model.model_name_or_path is None and data.dataset is not None:
        problems.append("--dataset needs --model_name_or_path: name a local model folder or a Hub id.")
    if data.dataset is None and model.model_name_or_path is not None and needs_data:
        problems.append("--model_name_or_path needs --dataset: name a file, a folder or a Hub id of pairs.")
    if data.objective == "dpo" and data.max_prompt_length >= data.max_length:
        problems.append(
            f"--max_prompt_length {data.max_prompt_length} leaves no room for an answer within --max_length "
            f"{data.max_length}: make it smaller."
        )
    if not 0 <= data.eval_fraction < 1:
        problems.append(f"--eval_fraction {data.eval_fraction}: must be at least 0 and below 1.")
    problems += _impossible_dropout(config.lora)
    if not 0 <= training.warmup_ratio <= 1:
        problems.append(f"--warmup_ratio {training.warmup_ratio}: must be between 0 and 1.")
    if training.save_total_limit < 2:
        problems.append(
            f"--save_total_limit {training.save_total_limit}: must be at least 2, so that one damaged checkpoint does "
            "not lose the run."
        )
    if training.save_minutes < 0:
        problems.append(f"--save_minutes {training.save_minutes}: must be at least 0 (0 saves by --save_steps alone).")
    revision = model.model_revision or ""
    if model.trust_remote_code and not (len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)):
        problems.append(
            "--trust_remote_code runs the model author's Python here: pin what you have read with "
            "--model_revision and its full 40-digit commit hash."
        )
    return problems


def _impossible_dropout(lora: LoraOptions) -> list[str]:
    if not 0 <= lora.lora_dropout < 1:
        return [f"--lora_dropout {lora.lora_dropout}: must be at least 0 and below 1."]
    if lora.lora_dropout and lora.lora_target_parameters:
        return [f"--lora_dropout {lora.lora_dropout}: --lora_target_parameters has none. Set it to 0."]
    return []


_POSITIVE = {
    "lora_r", "lora_alpha", "loraplus_lr_ratio", "max_length", "max_prompt_length", "max_train_samples",
    "max_eval_samples", "beta", "learning_rate", "num_train_epochs", "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_tokens_per_microbatch", "max_grad_norm", "logging_steps", "eval_steps", "save_steps", "max_new_tokens",
    "max_drift",
}  # fmt: skip


def _unknown_names(config: TrainConfig) -> list[str]:
    """Names in --report_to and --allow_changed that stand for nothing."""
    training, options = config.training, dict(config.items())
    mirrors = sorted(set(training.report_to) - {"wandb", "tensorboard", "none"})
    problems = [f"--report_to {' '.join(mirrors)}: known are wandb, tensorboard, none."] if mirrors else []
    for name in training.allow_changed:
        if name not in options:
            problems.append(f"--allow_changed {name}: there is no such option{nearest(name, options)}.")
    return problems


def _ignored(config: TrainConfig) -> list[str]:
    """Options that differ from their default although this run would not read them."""
    model, data, training, loss_type = config.model, config.data, config.training, " ".join(config.loss.loss_type)
    unread: list[tuple[str, bool, str]] = [
        ("bnb_4bit_quant_type", not uses_4bit(model), "the base is not quantized to 4 bit"),
        ("bnb_4bit_use_double_quant", not uses_4bit(model), "the base is not quantized to 4 bit"),
        ("eval_split", data.eval_dataset is not None, "--eval_dataset is given"),
        ("eval_fraction", data.eval_dataset is not None, "--eval_dataset is given"),
        ("eval_fraction", data.eval_split is not None, "--eval_split is given"),
        ("warmup_ratio", training.lr_scheduler_type == "constant", "--lr_scheduler_type constant has no warmup"),
        *((name, model.reference_model not in (None, model.model_name_or_path), "--reference_model brings its adapter")
          for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters",
                       "use_rslora", "use_dora", "modules_to_save")),
        *((name, data.objective == "sft", "--objective sft does not read it") for name in _OF_DPO),
        *((name, data.objective == "dpo", "--objective dpo does not read it") for name in _OF_SFT),
        *((name, data.objective == "dpo" and not config.has_reference, f"--loss_type {loss_type} has no reference")
          for name in (*(option.name for option in fields(StoreOptions)), "on_displacement")),
        ("reference_source", config.store.reference_store == "none", "--reference_store none keeps nothing"),
        ("row_reference", config.store.reference_source is not None, "--reference_source names the reference"),
        ("reference_source", config.store.reference_store is None, "--reference_store names no store that has it"),
        ("allow_changed", training.fresh, "--fresh starts anew, with any options"),
        ("max_new_tokens", not training.sample_generate and not config.is_demo, "--sample_generate is off"),
        *((name, config.is_demo, "the embedded demo brings its own pairs; name --model_name_or_path and --dataset")
          for name in _OF_REAL_TRAINING),
    ]  # fmt: skip
    values, defaults = dict(config.items()), dict(TrainConfig().items())
    return [
        f"--{name} {_shown(values[name])} would be ignored: {reason}."
        for name, is_unread, reason in unread
        if is_unread and values[name] != defaults[name]
    ]


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# What only one of the objectives reads: an SFT run has no reference, no pairs and no other loss.
_OF_DPO = (
    *(option.name for group in (LossOptions, StoreOptions) for option in fields(group)),
    "reference_model", "chosen_key", "rejected_key", "confidence_key", "max_prompt_length", "on_displacement", "lint",
)  # fmt: skip
_OF_SFT = ("messages_key", "response_key")
_OF_REAL_TRAINING = (
    "objective", "reference_model", "model_revision", "dataset_format", "dataset_split", "dataset_revision",
    "eval_dataset", "eval_split", "eval_fraction", "prompt_key", "chosen_key", "rejected_key", "messages_key",
    "category_key", "confidence_key", "ignore_columns", "response_key", "confidence_as", "prompt_template",
    "chat_template_kwargs", "system_prompt", "trust_remote_code",
)  # fmt: skip


def nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """`; the nearest is X`, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest is {prefix}{found[0]}" if found else ""
