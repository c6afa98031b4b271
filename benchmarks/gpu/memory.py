"""The plan's memory against what was held, and the claims for small cards under a hard cap."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.child import release, synchronize
from benchmarks.gpu.lengths import pair_lengths, seed_pairs
from benchmarks.gpu.models import config_folder
from benchmarks.gpu.ours import TOGETHER, Bench, built, device_here, peak_memory_gib, reset_peak
from benchmarks.gpu.rows import NEEDS_CUDA, OUT_OF_MEMORY, Row
from benchmarks.gpu.scale import SCALES, SEED, Scale
from qlora_dpo.config.checks import train_config
from qlora_dpo.config.training import PlanOptions, TrainConfig
from qlora_dpo.models.activation_checkpointing import set_activation_checkpointing
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.lora import add_adapter, trainable_parameters
from qlora_dpo.models.scoring import choose_scorer
from qlora_dpo.reference.local import local_reference
from qlora_dpo.training.memory.levels import describe
from qlora_dpo.training.memory.prediction import GIB, MemoryPlan, machine_of, plan_memory, skeleton_of
from qlora_dpo.training.memory.preflight import filled
from qlora_dpo.training.optimizers import make_optimizer

PROCESS_ROW = "process and libraries"
LATER_LIBRARIES = 0.2 * GIB  # what libraries may still allocate outside torch while a capped run goes on


@dataclass(frozen=True)
class Planned:
    """What `plan` says for a model, a rank, and pairs that fill a micro-batch."""

    memory: MemoryPlan
    config: TrainConfig

    @property
    def held_gib(self) -> float:
        """Without the reserve, which is to stay free, and the process, which is measured apart."""
        rows = self.memory.rows
        return sum(size for name, size in rows.items() if not name.startswith(("reserve", PROCESS_ROW))) / GIB

    @property
    def process_gib(self) -> float:
        """CUDA's context and libraries, as the plan assumes them."""
        return self.memory.fixed[PROCESS_ROW] / GIB


def planned(
    scale: Scale, model: str, rank: int, pairs: Sequence[Any], *, tokens: int | None, card_gib: float | None
) -> Planned:
    """The plan for these pairs on the card at hand, or on one of `card_gib`."""
    with tempfile.TemporaryDirectory() as folder:
        name = config_folder(scale.shapes[model], Path(folder))
        config = train_config(
            {
                "model_name_or_path": name, "lora_r": rank, "lora_alpha": rank, "max_tokens_per_microbatch": tokens,
                "gradient_accumulation_steps": scale.pairs_per_step,
                "use_cpu": not torch.cuda.is_available() and card_gib is None,
            },
            needs_data=False,
        )  # fmt: skip
        machine = machine_of(config, PlanOptions(gpu_memory=card_gib))
        skeleton = skeleton_of(config, machine)
    return Planned(plan_memory(config, skeleton, pair_lengths(pairs), machine), config)


def measure_memory(scale_name: str, model: str, cases: Sequence[tuple[int, int]]) -> Iterator[Row]:
    """Every (rank, tokens) on one base: what was planned, and what was held at most."""
    scale = SCALES[scale_name]
    context = context_gib()
    base, row = built(model, scale)
    yield row
    for rank, tokens in cases:
        name = f"{model}, r={rank}, {tokens} tokens"
        try:
            found = Row("memory", name, compare(base, scale, model, rank, tokens, context))
        except torch.OutOfMemoryError as error:
            found = Row("memory", name, note=f"{OUT_OF_MEMORY}: {str(error).splitlines()[0][:120]}")
        yield found
        release()


def compare(base: Any, scale: Scale, model: str, rank: int, tokens: int, context: float | None) -> dict[str, Any]:
    """Train two steps of one micro-batch that this budget allows."""
    device = device_here()
    pairs = seed_pairs(scale, model, 4 * scale.pairs_per_step)
    policy = add_adapter(base, r=rank, alpha=rank, dropout=0.0, target_modules=["all-linear"], seed=SEED)
    try:
        fuse_lora(policy)
        make_lean(policy)
        scorer = choose_scorer(policy, pairs[0], device)
        optimizer = make_optimizer("auto", trainable_parameters(policy), device, lr=1e-4, weight_decay=0.0)
        reference = local_reference(policy, scorer)
        bench = Bench(policy, pairs, scorer, "none", tokens, optimizer, reference, device, scale.pairs_per_step)
        engine = bench.engine(TOGETHER)
        members = filled(engine, [range(len(pairs))], tokens)
        engine.max_tokens = engine.cost(members)
        plan = planned(scale, model, rank, [pairs[n] for n in members], tokens=engine.max_tokens, card_gib=None)
        set_activation_checkpointing(policy, plan.memory.levels)
        reset_peak()
        for _ in range(2):
            bench.train_on(engine, members)
        return against_plan(plan, bench, engine.max_tokens, context)
    finally:
        policy.unload()
        for module in base.modules():
            vars(module).pop("forward", None)


def against_plan(plan: Planned, bench: Bench, tokens: int, context: float | None) -> dict[str, Any]:
    """Planned and held GiB, without the process on both sides, and the error in percent."""
    values: dict[str, Any] = {
        "tokens": tokens,
        "levels": describe(plan.memory.levels),
        "planned_gib": plan.held_gib,
        "planned_process_gib": plan.process_gib,
        "rows": {name: size / GIB for name, size in plan.memory.rows.items()},
    }
    if context is None:
        return values | {"held": NEEDS_CUDA}
    states = paged_bytes(bench.optimizer) / GIB
    held = peak_memory_gib() + states
    return values | {
        "held_gib": held,
        "paged_gib": states,
        "context_gib": context,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "error_percent": 100 * (plan.held_gib / held - 1),
    }


def paged_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's states that bitsandbytes holds outside torch's allocator."""
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))


def context_gib() -> float | None:
    """What CUDA's context and the libraries of a first product take on the card; None without one."""
    if not torch.cuda.is_available():
        return None
    before = used_before()
    square = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (square @ square).sum().backward()
    synchronize()
    return (outside_bytes() - before) / GIB


def used_before() -> int:
    """Bytes of the card that others use, asked of the driver before this process is on it."""
    if torch.cuda.is_initialized():  # nvidia-smi would count this process too
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(float(done.stdout.split()[0]) * 2**20)
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return 0


def outside_bytes() -> int:
    """Bytes that are used on the card beyond torch's allocator: context, libraries, paged states, other processes."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def measure_cap(scale_name: str, model: str, rank: int, card_gb: float) -> Iterator[Row]:
    """Three steps of the seed's pairs in a process that may not take more than a card of `card_gb` (10^9 bytes) has."""
    scale, cap = SCALES[scale_name], int(card_gb * 1e9)
    name = f"{model}, r={rank}, {card_gb:g} GB"
    before = used_before()
    torch.empty(1, device="cuda")
    context_gib()
    total = torch.cuda.get_device_properties(0).total_memory
    outside = outside_bytes() - before
    pairs = seed_pairs(scale, model, (scale.steps + 1) * scale.pairs_per_step)
    plan = planned(scale, model, rank, pairs, tokens=None, card_gib=cap / GIB)
    states = next(size for label, size in plan.memory.fixed.items() if label.startswith("optimizer"))
    allowed = cap - outside - states - LATER_LIBRARIES
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    base, _ = built(model, scale)
    yield Row("caps", name, capped_run(base, scale, model, rank, plan, cap, before))


def capped_run(base: Any, scale: Scale, model: str, rank: int, plan: Planned, cap: int, before: int) -> dict[str, Any]:
    """Train with what the plan chose, and look at the whole card after every step."""
    device = device_here()
    pairs = seed_pairs(scale, model, (scale.steps + 1) * scale.pairs_per_step)
    policy = add_adapter(base, r=rank, alpha=rank, dropout=0.0, target_modules=["all-linear"], seed=SEED)
    fuse_lora(policy)
    make_lean(policy)
    scorer = choose_scorer(policy, pairs[0], device)
    optimizer = make_optimizer("auto", trainable_parameters(policy), device, lr=1e-4, weight_decay=0.0)
    bench = Bench(
        policy, pairs, scorer, plan.memory.levels, plan.memory.tokens, optimizer, local_reference(policy, scorer),
        device, scale.pairs_per_step,
    )  # fmt: skip
    reset_peak()
    engine = bench.engine(TOGETHER)
    seconds, used = [], 0
    for number in range(scale.steps):
        seconds.append(bench.train_on(engine, bench.step_indices(number))[0])
        free, total = torch.cuda.mem_get_info()
        used = max(used, total - free - before)
    at_most = used - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()
    return {
        "fits": at_most <= cap,
        "cap_gib": cap / GIB,
        "used_gib": at_most / GIB,
        "allocated_gib": peak_memory_gib(),
        "paged_gib": paged_bytes(optimizer) / GIB,
        "planned_gib": plan.memory.needed / GIB,
        "plan_fits": plan.memory.fits,
        "max_tokens": engine.max_tokens,
        "levels": describe(plan.memory.levels),
        "layout": scorer.kind,
        "seconds": seconds,
    }
