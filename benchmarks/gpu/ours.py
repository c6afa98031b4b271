"""This tool's engine on a random base: what `train` does, and the same with any of its levers off."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.child import release, synchronize
from benchmarks.gpu.kernels import profile_step
from benchmarks.gpu.lengths import PairSource, seed_pairs
from benchmarks.gpu.models import build_random_base, config_folder
from benchmarks.gpu.rows import OUT_OF_MEMORY, Row
from benchmarks.gpu.scale import SCALES, SEED, Scale
from benchmarks.processes import peak_gib
from qlora_dpo.config.checks import train_config
from qlora_dpo.data.packing import pack
from qlora_dpo.models.activation_checkpointing import Level, set_activation_checkpointing
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.lora import add_adapter, trainable_parameters
from qlora_dpo.models.scoring import Head, Scorer, choose_scorer
from qlora_dpo.objectives.objective import make_objective
from qlora_dpo.reference.local import ReferenceLogps, local_reference
from qlora_dpo.training.engine import DEFAULT_MAX_TOKENS, Engine
from qlora_dpo.training.folder.checkpoints import rng_states
from qlora_dpo.training.memory.device_memory import device_memory, within_memory
from qlora_dpo.training.memory.levels import describe, levels_of_run
from qlora_dpo.training.memory.preflight import preflight
from qlora_dpo.training.optimizers import make_optimizer

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Form:
    """The levers of the engine; `auto` is what `train` chooses for the memory that is free."""

    sharing: bool = True
    packing: bool = True
    reference_known: bool = True
    fused_lora: bool = True
    lean_layers: bool = True
    chunked_head: bool = True
    checkpointing: Level | Literal["auto"] = "auto"


TOGETHER = Form()
NONE_OF_THEM = Form(False, False, False, False, False, False, "full")
LEVER_WORDS = {
    "sharing": "prompt sharing", "packing": "packing", "reference_known": "reference known", "fused_lora": "fused LoRA",
    "lean_layers": "lean layers", "chunked_head": "chunked head", "checkpointing": "chosen checkpointing",
}  # fmt: skip


def lever_forms() -> dict[str, Form]:
    """All levers, each left out, none, and each alone; then the levels of checkpointing."""
    forms = {"all levers": TOGETHER, "no lever": NONE_OF_THEM}
    for option in fields(Form):
        words = LEVER_WORDS[option.name]
        forms[f"all but {words}"] = replace(TOGETHER, **{option.name: getattr(NONE_OF_THEM, option.name)})
        forms[f"only {words}"] = replace(NONE_OF_THEM, **{option.name: getattr(TOGETHER, option.name)})
    for level in ("none", "selective", "full"):
        forms[f"all levers, {level} checkpointing"] = replace(TOGETHER, checkpointing=level)  # type: ignore[arg-type]
    return forms


@dataclass
class Bench:
    """A policy on the device with what `train` would have found out about it."""

    model: Any
    pairs: list[Any]
    scorer: Scorer
    levels: Any
    max_tokens: int
    optimizer: torch.optim.Optimizer
    reference: ReferenceLogps
    device: torch.device
    pairs_per_step: int
    preflight_seconds: float = 0.0

    @classmethod
    def make(cls, base: Any, scale: Scale, model: str, rank: int, steps: int) -> Bench:
        """The bench on this base, prepared as `train` prepares a run: levers, self-check, levels, preflight."""
        device = next(base.parameters()).device
        pairs = seed_pairs(scale, model, (steps + 1) * scale.pairs_per_step)
        policy = add_adapter(base, r=rank, alpha=rank, dropout=0.0, target_modules=["all-linear"], seed=SEED)
        fuse_lora(policy)
        make_lean(policy)
        scorer = choose_scorer(policy, pairs[0], device)
        with tempfile.TemporaryDirectory() as folder:
            options = {"model_name_or_path": config_folder(scale.shapes[model], Path(folder)), "lora_r": rank}
            config = train_config(options | {"use_cpu": device.type == "cpu"}, needs_data=False)
        source: Any = PairSource(pairs)
        levels = levels_of_run(config, policy, scorer.kind, source, device)
        parameters = trainable_parameters(policy)
        optimizer = make_optimizer("auto", parameters, device, lr=LEARNING_RATE, weight_decay=0.0)
        bench = cls(
            policy, pairs, scorer, levels, DEFAULT_MAX_TOKENS, optimizer, local_reference(policy, scorer), device,
            scale.pairs_per_step,
        )  # fmt: skip
        bench.find_budget()
        return bench

    def find_budget(self) -> None:
        """The token budget that `train` finds, with the seconds that finding it takes."""
        engine = self.engine(TOGETHER)
        steps = [self.step_indices(number) for number in range(len(self.pairs) // self.pairs_per_step)]
        started, memory = synchronize(), device_memory(self.device)
        preflight(engine, self.optimizer, steps, [], lambda: None, memory=memory, find_budget=True)
        self.max_tokens, self.preflight_seconds = engine.max_tokens, synchronize() - started

    def engine(self, form: Form) -> Engine:
        """The engine with the levers of this form; the policy is changed accordingly."""
        for module in self.model.modules():
            vars(module).pop("forward", None)  # the fused and the lean forwards sit on the instances
        if form.fused_lora:
            fuse_lora(self.model)
        if form.lean_layers:
            make_lean(self.model)
        set_activation_checkpointing(self.model, self.levels if form.checkpointing == "auto" else form.checkpointing)
        head = self.scorer.head
        assert head is not None
        if not form.chunked_head:
            head = WholeHead(head.module, head.scale, head.softcap)
        scorer = Scorer(self.scorer.kind if form.sharing else "padded", head)
        return Engine(
            model=self.model,
            scorer=scorer,
            objective=make_objective(),
            pairs=self.pairs,
            reference=self.reference if form.reference_known else local_reference(self.model, scorer),
            device=self.device,
            max_tokens=self.max_tokens if form.packing else 1,
            group=1,
        )

    def step_indices(self, number: int) -> range:
        """The pairs of a step."""
        return range(number * self.pairs_per_step, (number + 1) * self.pairs_per_step)

    def fill_reference(self) -> float:
        """Score every pair with the reference, which is then known; returns the seconds of one step's pairs."""
        engine = self.engine(TOGETHER)
        self.reference = local_reference(self.model, engine.scorer)
        engine.reference = self.reference
        started = synchronize()
        for members in engine.micro_batches(range(len(self.pairs))):
            self.reference(members, pack([self.pairs[index] for index in members], engine.scorer.kind).to(self.device))
        return (synchronize() - started) * self.pairs_per_step / len(self.pairs)

    def train_on(self, engine: Engine, indices: Sequence[int]) -> tuple[float, float]:
        """One optimizer step as `train` makes it; returns its seconds and its loss."""
        started, rng = synchronize(), rng_states()
        metrics = within_memory(engine, indices, rng, lambda: engine.accumulate_gradient(indices, lambda: None))
        torch.nn.utils.clip_grad_norm_(trainable_parameters(self.model), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return synchronize() - started, metrics["loss"]


@dataclass(frozen=True)
class WholeHead(Head):
    """The head as one product with all logits in fp32."""

    def logps(self, hidden: Tensor, target_ids: Tensor, with_squares: bool) -> tuple[Tensor, Tensor | None]:
        logits = F.linear(hidden, self._weight(hidden)).float() * self.scale
        return logits.log_softmax(-1).gather(1, target_ids[:, None])[:, 0], None


def peak_memory_gib() -> float:
    """What torch held at most since the last reset on the GPU; on a CPU the process's own peak."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak_gib()


def reset_peak() -> None:
    """Count the peak from here."""
    release()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def device_here() -> torch.device:
    """The GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def built(shape_name: str, scale: Scale) -> tuple[Any, Row]:
    """A random base and the row that says what building it took."""
    reset_peak()
    started = synchronize()
    base = build_random_base(scale.shapes[shape_name], device_here())
    seconds = synchronize() - started
    held = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else None
    parameters = scale.shapes[shape_name].config
    values = {"seconds": seconds, "held_gib": held, "peak_gib": peak_memory_gib(), "shape": parameters}
    return base, Row("models", shape_name, values)


def measure_form(bench: Bench, form: Form, steps: int, warm_up: int) -> dict[str, Any]:
    """Seconds of `steps` steps after one of `warm_up` pairs, tokens, losses and the peak."""
    engine = bench.engine(form)
    reset_peak()
    _, first_loss = bench.train_on(engine, bench.step_indices(0)[:warm_up])
    found = [bench.train_on(engine, bench.step_indices(number + 1)) for number in range(steps)]
    seconds = [took for took, _ in found]
    counted = range(bench.pairs_per_step, (steps + 1) * bench.pairs_per_step)
    levels = bench.levels if form.checkpointing == "auto" else form.checkpointing
    return {
        "seconds": seconds,
        "pairs_per_second": bench.pairs_per_step / statistics.median(seconds),
        "tokens_per_second": unshared(bench.pairs, counted) / steps / statistics.median(seconds),
        "model_tokens_per_step": engine.tokens(counted) / steps,
        "max_tokens": engine.max_tokens,
        "levels": levels if isinstance(levels, str) else describe(levels),
        "peak_gib": peak_memory_gib(),
        "losses": [first_loss, *(loss for _, loss in found)],
    }


def unshared(pairs: Sequence[Any], indices: Sequence[int]) -> int:
    """Tokens of two plain sequences per pair without padding: the same measure of work for every program."""
    chosen = (pairs[index] for index in indices)
    return sum(2 * len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in chosen)


def measure_levers(scale_name: str, model: str, levers: Sequence[str]) -> Iterator[Row]:
    """Some levers' rows in a process of their own."""
    scale = SCALES[scale_name]
    base, _ = built(model, scale)
    bench = Bench.make(base, scale, model, scale.rank, scale.steps)
    bench.fill_reference()
    for name in levers:
        yield lever_row(bench, scale, model, name)


def headline(scale_name: str, model: str, levers: Sequence[str]) -> Iterator[Row]:
    """The run of the seed on this model: reference known, then in a first epoch, the split of a step, the levers."""
    scale = SCALES[scale_name]
    base, row = built(model, scale)
    yield row
    bench = Bench.make(base, scale, model, scale.rank, scale.steps)
    reference_seconds = bench.fill_reference()
    found = measure_form(bench, TOGETHER, scale.steps, scale.pairs_per_step)
    found |= {
        "reference_seconds": reference_seconds,
        "preflight_seconds": bench.preflight_seconds,
        "build_seconds": row.values["seconds"],
        "layout": bench.scorer.kind,
        "rank": scale.rank,
        "pairs_per_step": scale.pairs_per_step,
    }
    yield Row("speed", f"{model}: ours, reference known", found)
    inline = measure_form(bench, replace(TOGETHER, reference_known=False), scale.steps, 2)
    yield Row("speed", f"{model}: ours, first epoch", inline)
    yield Row("split", model, profile_of(bench, scale, model))
    for name in levers:
        yield lever_row(bench, scale, model, name)


def profile_of(bench: Bench, scale: Scale, model: str) -> dict[str, Any]:
    """Where one step's time goes, by kind of kernel."""
    engine, vocabulary = bench.engine(TOGETHER), scale.shapes[model].vocabulary
    return profile_step(lambda: bench.train_on(engine, bench.step_indices(1)), scale.rank, vocabulary)


def lever_row(bench: Bench, scale: Scale, model: str, name: str) -> Row:
    """One lever's row; where memory does not suffice the row says so."""
    try:
        found = measure_form(bench, lever_forms()[name], scale.lever_steps, 2)
    except torch.OutOfMemoryError as error:
        note = f"{OUT_OF_MEMORY}: {str(error).splitlines()[0][:120]}"
    else:
        return Row("levers", f"{model}: {name}", found)
    bench.model.zero_grad(set_to_none=True)
    release()
    return Row("levers", f"{model}: {name}", note=note)
