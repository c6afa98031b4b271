"""`plan`: where each GB goes, how long a run takes and what it costs, before any weights are loaded."""

from __future__ import annotations

from qlora_dpo.config.training import PlanOptions, TrainConfig, uses_4bit
from qlora_dpo.errors import ResourceError
from qlora_dpo.models.lora import POLICY, describe_experts
from qlora_dpo.models.skeleton import Skeleton
from qlora_dpo.training.data import TrainingData, load_training_data
from qlora_dpo.training.memory.levels import Lengths, describe, lengths_of, trained_bytes
from qlora_dpo.training.memory.prediction import GIB, MemoryPlan, machine_of, plan_memory, skeleton_of
from qlora_dpo.training.optimizers import optimizer_name
from qlora_dpo.training.policy import load_base_config, load_training_tokenizer
from qlora_dpo.training.row_positions import check_positions
from qlora_dpo.training.schedule import make_schedule
from qlora_dpo.training.speed import count_flops, rates, work_of_run


def plan(config: TrainConfig, options: PlanOptions) -> None:
    """Print where each GB goes and, with a data set, tokens, steps, hours and cost.

    Raises:
        ResourceError: the run does not fit, after the table was printed.
        QloraDpoError: what loading model or data would raise.
    """
    machine = machine_of(config, options)
    skeleton = skeleton_of(config, machine)
    data = None
    if config.data.dataset is not None:
        data = load_training_data(config.data, load_training_tokenizer(config), config.training.seed)
        check_positions(load_base_config(config.model), data, config.model.trust_remote_code)
    lengths = None if data is None else lengths_of(data, data.epoch(0))
    memory = plan_memory(config, skeleton, lengths, machine)
    print("\n".join(memory_table(memory, skeleton, config.training.activation_checkpointing)))
    if not memory.fits:
        raise does_not_fit(config, memory, skeleton)
    if data is not None and lengths is not None:
        print("\n".join(["", *time_table(config, options, memory, skeleton, data, lengths)]))


def does_not_fit(config: TrainConfig, memory: MemoryPlan, skeleton: Skeleton) -> ResourceError:
    """The error of a plan that does not fit, with what would help in this case."""
    optimizer = optimizer_name(config.training.optim, memory.machine.device_type)
    of_adapter = memory.fixed["adapter"] + sum(trained_bytes(skeleton, optimizer))
    advice = [
        "quantize the base (--load_in_4bit true)" if not uses_4bit(config.model) else "",
        "leave --activation_checkpointing to auto" if config.training.activation_checkpointing != "auto" else "",
        "train no experts (--lora_target_parameters)" if skeleton.policy.peft_config[POLICY].target_parameters else "",
        f"lower --lora_r (each 8 of it take {8 * of_adapter / skeleton.r / GIB:.2f} GiB)",
        "use --optim paged_adamw_8bit" if memory.machine.device_type == "cuda" and "8bit" not in optimizer else "",
        f"lower --max_length or --max_tokens_per_microbatch (now {memory.tokens} tokens at once)",
        "take a machine with more memory",
    ]
    return ResourceError(
        f"{_gib(memory.needed)} GiB are needed and {_gib(memory.machine.capacity)} are there, with "
        f"{describe(memory.levels)} and {memory.tokens} tokens at once. What helps: {'; '.join(filter(None, advice))}."
    )


def memory_table(memory: MemoryPlan, skeleton: Skeleton, asked: str) -> list[str]:
    """The rows of the plan, the levels to choose from, and the choice."""
    lines = [
        f"Memory for {memory.machine.words}, counted without loading weights (GiB):",
        *(f"  {name:44} {size / GIB:9.3f}" for name, size in memory.rows.items() if size),
        f"  {'together':44} {memory.needed / GIB:9.3f} of {_gib(memory.machine.capacity)}",
        f"{skeleton.adapter_parameters / 1e6:.1f} M parameters are trained; the largest weight takes "
        f"{skeleton.weights.largest / GIB:.2f} GiB while it is dequantized.",
    ]
    of_experts = describe_experts(skeleton.weights.experts, skeleton.policy.peft_config[POLICY])
    lines += [of_experts] if of_experts else []
    counted = memory.counted
    if counted is None:
        return [*lines, "What the layers keep for the backward pass cannot be counted for this architecture."]
    lines += ["", f"Activations of a micro-batch of {memory.tokens} tokens:"]
    lines += [f"  {'level':12}{'MB per token':>14}{'GiB kept':>12}{'GiB at the peak':>18}"]
    for level, layers in counted.layers.items():
        size, peak = sum(layers), counted.peak((level,) * len(layers))
        lines += [f"  {level:12}{size / counted.tokens / 1e6:14.2f}{size / GIB:12.3f}{peak / GIB:18.3f}"]
    lines += [f"The log-probs' tile takes {counted.head_tile / GIB:.3f} GiB of the peak.", "", *_choice(memory, asked)]
    return lines


def _choice(memory: MemoryPlan, asked: str) -> list[str]:
    """Level and token budget in words, with their reasons."""
    assert memory.counted is not None
    offloaded = sum(level == "offload" for level in memory.levels)
    fits = "the least recomputation that fits" if memory.fits else "even that does not fit"
    why = fits if asked == "auto" else "as asked"
    halved = f", because {memory.wanted_tokens} do not fit" if memory.tokens < memory.wanted_tokens else ""
    lines = [
        f"Activation checkpointing: {describe(memory.levels)} ({why}).",
        f"Tokens at once (--max_tokens_per_microbatch): {memory.tokens}{halved}.",
    ]
    if offloaded:
        lines += [f"{_gib(offloaded * memory.counted.host)} GiB of CPU memory hold what is offloaded."]
    if memory.kind == "padded":
        lines += ["This architecture cannot share a prompt: padded rows, each completion with its own prompt."]
    return lines


def time_table(
    config: TrainConfig, options: PlanOptions, memory: MemoryPlan, skeleton: Skeleton, data: TrainingData,
    lengths: Lengths,
) -> list[str]:  # fmt: skip
    """Tokens, what sharing saves, steps, hours and cost."""
    schedule = make_schedule(
        data.train, config.pairs_per_step, epochs=config.training.num_train_epochs,
        max_steps=config.training.max_steps, seed=config.training.seed, sampler=data.sampler,
    )  # fmt: skip
    costs = lengths.costs(memory.kind)
    work = work_of_run(
        costs, lengths.targets, schedule=schedule, held_out=len(data.held_out), eval_steps=config.training.eval_steps,
        distinct=len(data.train), has_reference=config.has_reference,
    )  # fmt: skip
    flops = count_flops(skeleton, memory.levels, uses_4bit(config.model))
    tokens, apart = int(costs.sum()), int((costs + lengths.shared).sum())
    saved = f"sharing prompts saves {apart - tokens:,} of {apart:,} ({(apart - tokens) / apart:.0%})"
    lines = [
        *data.summary(),
        f"{tokens:,} tokens in the training {data.unit}"
        + ("; padding included" if memory.kind == "padded" else f"; {saved}" if apart > tokens else ""),
        f"{schedule.total_steps:,} steps of {config.pairs_per_step} {data.unit}; {work.trained:,.0f} tokens to train "
        + (f"on, {work.reference:,.0f} for the reference (once per pair), " if work.reference else "on, ")
        + f"{work.evaluated:,.0f} to evaluate",
        "",
        "Time, an estimate: operations counted, attention and everything small left to the rate.",
    ]
    measured, price = options.tokens_per_second, options.gpu_price_per_hour
    if measured is not None:
        found = [("at --tokens_per_second", measured * flops.training(work) / work.trained)]
    else:
        found = rates(memory.machine.device, skeleton.dtype)
    for name, rate in found:
        hours = flops.total(work) / rate / 3600
        cost = "" if price is None else f", cost {hours * price:,.2f} at {price:g} per hour"
        per_second = work.trained * rate / flops.training(work)
        lines += [f"  {name}: {_duration(hours)}{cost} ({per_second:,.0f} trained tokens per second)"]
    return lines


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"
