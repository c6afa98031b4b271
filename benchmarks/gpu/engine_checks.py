"""Whether training on this device does what it does on a CPU: scoring, optimizer, preflight, running out of memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.child import release
from benchmarks.gpu.models import build_random_base
from benchmarks.gpu.ours import TOGETHER, Bench, device_here
from benchmarks.gpu.rows import NEEDS_CUDA, Row
from benchmarks.gpu.scale import SCALES, SEED, Scale, Shape
from qlora_dpo.data.packing import pack
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import NOISE_MARGIN, TOLERANCE, Scorer
from qlora_dpo.training.folder.checkpoints import rng_states
from qlora_dpo.training.loop import IDENTITY_TOLERANCE
from qlora_dpo.training.memory.device_memory import CudaMemory, within_memory
from qlora_dpo.training.optimizers import make_optimizer

RANK = 16
LOGPS, GRADIENTS = 1e-2, 5e-2  # differences that bf16 alone makes: per token, and relative
OF_THE_WAY = 0.05  # that eight-bit states may stray in ten steps


def measure_engine(scale_name: str) -> Iterator[Row]:
    """All checks, on a model of a few layers in NF4."""
    scale = SCALES[scale_name]
    bench = check_bench(scale)
    yield first_step(bench)
    yield from packed_against_plain(bench)
    if not torch.cuda.is_available():
        for name in ("paged_adamw_8bit", "preflight's budget", "out of memory"):
            yield Row("checks", name, note=NEEDS_CUDA)
        return
    yield preflight_budget(bench)
    yield optimizer_step()
    yield out_of_memory(bench)


def check_bench(scale: Scale) -> Bench:
    """A policy that differs from its reference nowhere, of LLaMA's proportions with grouped queries."""
    width, vocabulary = scale.check_width, scale.shapes["33B"].vocabulary
    config = scale.shapes["33B"].config | {
        "hidden_size": width, "intermediate_size": 5 * width // 2, "num_hidden_layers": 4,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 128, "vocab_size": vocabulary,
    }  # fmt: skip
    base = build_random_base(Shape("llama", config), device_here())
    return Bench.make(base, scale, "33B", RANK, steps=2)


def first_step(bench: Bench) -> Row:
    """With a fresh adapter the policy is the reference: the loss is ln 2, where both see the same micro-batches."""
    metrics = bench.engine(replace(TOGETHER, reference_known=False)).evaluate(bench.step_indices(0), lambda: None)
    off = abs(metrics["loss"] - math.log(2))
    limit = IDENTITY_TOLERANCE / 2  # `train` asks that of the rewards, whose half the loss is here
    values = {"passed": off < limit, "found": f"{off:.1e}", "limit": f"{limit:g}", "how": f"{bench.scorer.kind} rows"}
    return Row("checks", "first step: |loss - ln 2|", values)


def packed_against_plain(bench: Bench) -> Iterator[Row]:
    """Log-probs and LoRA gradients of the shared layout against one plain padded run, beside the noise floor: another
    plain run in which each pair is a batch of its own."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        for parameter in trainable_parameters(bench.model):
            parameter.normal_(0, 0.02)
    bench.engine(TOGETHER)
    pairs = bench.pairs[: bench.pairs_per_step]
    plain, one_by_one = Scorer("padded", None), [[pair] for pair in pairs]
    shared = logps_and_gradients(bench, bench.scorer, [pairs])
    together, alone = logps_and_gradients(bench, plain, [pairs]), logps_and_gradients(bench, plain, one_by_one)
    off, noise = [(found[0] - together[0]).abs().mean().item() for found in (shared, alone)]
    limit = max(NOISE_MARGIN * noise, LOGPS)
    words = {"how": f"{bench.scorer.kind} rows, bf16", "limit": f"{limit:.1e}; noise floor {noise:.1e}"}
    passed = bench.scorer.kind == "shared" and off <= min(limit, TOLERANCE[torch.bfloat16])
    yield Row("checks", "packed log-probs, per token", {"passed": passed, "found": f"{off:.1e}", **words})
    off, noise = [gradient_distance(found[1], together[1]) for found in (shared, alone)]
    limit = max(NOISE_MARGIN * noise, GRADIENTS)
    words["limit"] = f"{limit:.1e}; noise floor {noise:.1e}"
    yield Row("checks", "packed LoRA gradients, relative", {"passed": off <= limit, "found": f"{off:.1e}", **words})


def logps_and_gradients(bench: Bench, scorer: Scorer, batches: list[list[Any]]) -> tuple[Tensor, list[Tensor]]:
    """Log-probs of all pairs, and the gradients of chosen minus rejected ones."""
    bench.model.zero_grad(set_to_none=True)
    found = []
    for pairs in batches:
        batch = pack(pairs, scorer.kind).to(bench.device)
        logps = scorer.per_token_logps(bench.model, batch)
        signs = [1.0 if number % 2 == 0 else -1.0 for number in range(len(batch.completion_lengths))]
        weights = torch.tensor(signs).repeat_interleave(torch.tensor(batch.completion_lengths)).to(logps)
        (logps * weights).sum().backward()
        found.append(logps.detach())
    gradients = [p.grad.double() for p in trainable_parameters(bench.model) if p.grad is not None]
    bench.model.zero_grad(set_to_none=True)
    return torch.cat(found), gradients


def gradient_distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The distance of all gradients together, relative to their length."""
    off = sum((one - other).square().sum().item() for one, other in zip(found, expected, strict=True))
    return math.sqrt(off / sum(other.square().sum().item() for other in expected))


def preflight_budget(bench: Bench) -> Row:
    """The preflight found a budget by the device's memory, and that budget trains."""
    loss = bench.train_on(bench.engine(TOGETHER), bench.step_indices(0))[1]
    values = {
        "passed": bench.max_tokens > 0 and math.isfinite(loss),
        "found": f"{bench.max_tokens} tokens in {bench.preflight_seconds:.1f} s",
        "limit": "a step trains with it",
        "how": f"{bench.scorer.kind} rows",
    }
    return Row("checks", "preflight's budget", values)


def optimizer_step() -> Row:
    """The optimizer that `auto` is on a GPU against torch's AdamW in fp32: ten steps with the same gradients."""
    device = device_here()
    torch.manual_seed(SEED)
    start = torch.randn(512, 512, device=device)
    ours, exact = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        make_optimizer(name, [parameter], device, lr=1e-3, weight_decay=0.0)
        for name, parameter in (("auto", ours), ("adamw_torch", exact))
    ]
    for _ in range(10):
        gradient = torch.randn_like(start)
        for parameter, optimizer in zip((ours, exact), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    off = ((ours - exact).norm() / (exact - start).norm()).item()
    values = {
        "passed": off < OF_THE_WAY,
        "found": f"{off:.1e} of the way",
        "limit": f"{OF_THE_WAY:g}",
        "how": "10 steps, 512 x 512",
    }
    return Row("checks", "paged_adamw_8bit", values)


def out_of_memory(bench: Bench) -> Row:
    """With a hard cap a step that does not fit is repeated in halves, and gives the loss that it gives without one."""
    bench.fill_reference()
    engine, indices = bench.engine(TOGETHER), bench.step_indices(1)
    whole = engine.tokens(indices)
    engine.max_tokens = whole
    expected = bench.engine(TOGETHER).evaluate(indices, lambda: None)["loss"]
    memory = CudaMemory(bench.device)
    memory.start()
    engine.accumulate_gradient(indices, lambda: None)
    bench.model.zero_grad(set_to_none=True)
    grown, total = memory.grown(), torch.cuda.get_device_properties(bench.device).total_memory
    release()
    cap = torch.cuda.memory_reserved() + 0.75 * grown
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        metrics = within_memory(
            engine, indices, rng_states(), lambda: engine.accumulate_gradient(indices, lambda: None)
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        bench.model.zero_grad(set_to_none=True)
    off = abs(metrics["loss"] - expected)
    values = {
        "passed": engine.max_tokens < whole and off < 1e-2,
        "found": f"{whole} tokens became {engine.max_tokens}; the loss is off by {off:.1e}",
        "limit": "fewer tokens; 1e-02",
        "how": f"{cap / 2**30:.2f} GiB allowed",
    }
    return Row("checks", "out of memory", values)
