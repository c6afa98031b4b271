"""What a run would hold in memory on some machine, and the levels and token budget that make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qlora_dpo.config.training import PlanOptions, TrainConfig, quantization_of, uses_4bit
from qlora_dpo.data.packing import LayoutKind
from qlora_dpo.errors import ModelError
from qlora_dpo.models.activation_checkpointing import Level
from qlora_dpo.models.loading import check_cpu_quantizable, choose_device
from qlora_dpo.models.lora import check_adapter_folder
from qlora_dpo.models.memory import Activations, count_activations
from qlora_dpo.models.skeleton import Skeleton, build_skeleton
from qlora_dpo.training.memory.levels import (
    CPU_SHARE,
    RESERVE,
    UNCOUNTED,
    ConversationLengths,
    Lengths,
    PairLengths,
    asked_tokens,
    available_cpu_memory,
    choose_levels,
    largest_micro_batch,
    list_of_targets,
    trained_bytes,
)
from qlora_dpo.training.optimizers import optimizer_name
from qlora_dpo.training.policy import load_base_config

GIB = 2**30
PROCESS = {"cuda": 0.8 * GIB, "cpu": 0.7 * GIB}  # CUDA's context and libraries; Python's
SMALLEST = 512  # tokens of a micro-batch without a data set
# Without a data set: of prompt, chosen and rejected; of a conversation, what stands before the answer, and the answer.
DEFAULT_LENGTHS: dict[str, Lengths] = {
    "dpo": PairLengths(*np.array([[256], [384], [384]])),
    "sft": ConversationLengths(*np.array([[640], [256], [384]])),
}


@dataclass(frozen=True)
class Machine:
    """What the run is planned for; `capacity` is in bytes, `device` is set where it is the machine at hand."""

    device_type: str
    capacity: float
    words: str
    device: torch.device | None


@dataclass(frozen=True)
class MemoryPlan:
    """The choice for one run: layout, levels, tokens of a micro-batch, and bytes by what holds them.

    `tokens` differ from `wanted_tokens` where these did not fit; `counted` is None where the architecture cannot be
    counted.
    """

    kind: LayoutKind
    tokens: int
    wanted_tokens: int
    levels: tuple[Level, ...]
    counted: Activations | None
    fixed: dict[str, float]
    machine: Machine

    @property
    def rows(self) -> dict[str, float]:
        """Bytes by what holds them; their sum is what the machine must have."""
        rows = dict(self.fixed)
        if self.counted is not None:
            kept, outside = self.counted.kept(self.levels), self.counted.kept_outside(self.levels)
            rows["activations of the layers"] = kept - outside
            rows["embeddings, last norm, log-probs"] = outside
            rows["working set of one layer"] = self.counted.peak(self.levels) - kept
        return rows

    @property
    def needed(self) -> float:
        """Bytes in all."""
        return sum(self.rows.values())

    @property
    def fits(self) -> bool:
        """Whether the machine has that much."""
        return self.needed <= self.machine.capacity


def machine_of(config: TrainConfig, options: PlanOptions) -> Machine:
    """The GPU of --gpu_memory, else this machine's, else its CPU."""
    device = choose_device(config.model.use_cpu)
    if options.gpu_memory is not None:
        words = f"a GPU with {options.gpu_memory:g} GiB"
        return Machine("cuda", options.gpu_memory * GIB, words, device if device.type == "cuda" else None)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Machine("cuda", properties.total_memory, properties.name, device)
    available = available_cpu_memory()
    words = f"the CPU with {CPU_SHARE:.0%} of the {available / GIB:.1f} GiB of memory that are available"
    return Machine("cpu", CPU_SHARE * available, words, device)


def skeleton_of(config: TrainConfig, machine: Machine) -> Skeleton:
    """The policy of these options without its weights.

    Raises:
        QloraDpoError: the model, its layers or the adapter cannot be used.
    """
    model, lora = config.model, config.lora
    hub = load_base_config(model)
    if machine.device_type == "cpu" and uses_4bit(model):
        check_cpu_quantizable(hub, model.trust_remote_code)
    r, targets, parameters = lora.lora_r, list(lora.lora_target_modules), list(lora.lora_target_parameters)
    rank_pattern: dict[str, int] = {}
    use_dora, whole = lora.use_dora, list(lora.modules_to_save)
    if starts_from_adapter(config):
        adapter = check_adapter_folder(Path(str(model.reference_model)))
        r, targets = int(adapter["r"]), list_of_targets(adapter["target_modules"])
        parameters, rank_pattern = adapter.get("target_parameters") or [], adapter.get("rank_pattern") or {}
        use_dora, whole = bool(adapter.get("use_dora")), adapter.get("modules_to_save") or []
    return build_skeleton(
        hub, quantization=quantization_of(model), r=r, target_modules=targets,
        target_parameters=parameters, rank_pattern=rank_pattern, use_dora=use_dora, modules_to_save=whole,
        dtype=torch.float32 if model.dtype == "float32" else torch.bfloat16,
        trust_remote_code=model.trust_remote_code,
    )  # fmt: skip


def starts_from_adapter(config: TrainConfig) -> bool:
    """Whether the policy starts from a saved adapter."""
    return config.model.reference_model not in (None, config.model.model_name_or_path)


def has_frozen_adapter(config: TrainConfig) -> bool:
    """Whether a frozen copy of the start is the reference, so that there are two adapters."""
    return starts_from_adapter(config) and config.has_reference


def plan_memory(config: TrainConfig, skeleton: Skeleton, lengths: Lengths | None, machine: Machine) -> MemoryPlan:
    """Choose levels and a token budget: the one asked for, or halves of it where even the last level does not fit."""
    fixed = fixed_bytes(config, skeleton, machine)
    free = machine.capacity - sum(fixed.values())
    budget = asked_tokens(config, machine.device_type)
    wanted = None
    while True:
        kind, tokens, counted = count_micro_batch(config, skeleton, lengths, machine, budget)
        wanted = wanted or tokens
        if counted is None:
            return MemoryPlan(kind, tokens, wanted, (UNCOUNTED,) * len(skeleton.kinds), None, fixed, machine)
        memory = MemoryPlan(kind, tokens, wanted, levels_for(config, counted, free), counted, fixed, machine)
        smallest = SMALLEST if lengths is None else int(lengths.costs(kind).max())
        if memory.fits or tokens <= smallest:
            return memory
        budget = max(smallest, tokens // 2)


def fixed_bytes(config: TrainConfig, skeleton: Skeleton, machine: Machine) -> dict[str, float]:
    """What is held whatever the micro-batch is, by what holds it."""
    optimizer = optimizer_name(config.training.optim, machine.device_type)
    gradients, states = trained_bytes(skeleton, optimizer)
    fixed = {
        "quantized weights": float(skeleton.weights.quantized),
        "other weights": float(skeleton.weights.other),
        "adapter": float(skeleton.adapter_bytes * (2 if has_frozen_adapter(config) else 1)),
        "process and libraries": PROCESS[machine.device_type],
    }
    if machine.device_type == "cuda":
        left = machine.capacity - sum(fixed.values())
        fixed[f"reserve ({RESERVE:.0%} of what these leave)"] = max(0.0, RESERVE * left)
    return fixed | {"gradients of the adapter": float(gradients), f"optimizer ({optimizer})": float(states)}


def count_micro_batch(
    config: TrainConfig, skeleton: Skeleton, lengths: Lengths | None, machine: Machine, budget: int
) -> tuple[LayoutKind, int, Activations | None]:
    """Layout, tokens and activations of the largest micro-batch: prompts shared, else padded rows, else uncounted."""
    kinds: tuple[LayoutKind, ...] = ("shared", "padded")
    for kind in kinds:
        tokens = largest_micro_batch(lengths, kind, budget, config.pairs_per_step)
        made = (lengths or DEFAULT_LENGTHS[config.data.objective]).made(tokens, kind)
        try:
            return kind, tokens, count_activations(skeleton, made, kind, machine.device_type)
        except ModelError:
            continue
    return kind, tokens, None


def levels_for(config: TrainConfig, counted: Activations, free: float) -> tuple[Level, ...]:
    """The level of every layer: the one asked for, or for auto what fits into `free` bytes."""
    asked = config.training.activation_checkpointing
    if asked == "auto":
        return choose_levels(counted, free)
    level: Level = asked if asked in counted.layers else "full"  # offload on a CPU
    return (level,) * len(counted.layers["none"])
