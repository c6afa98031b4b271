"""Before the first step: find the token budget and try the most expensive micro-batches, without leaving a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.training.engine import Engine
from qlora_dpo.training.folder.checkpoints import restore_rng_states, rng_states
from qlora_dpo.training.memory.device_memory import DeviceMemory, halve_budget
from qlora_dpo.training.parallel.ranks import ALONE

SMALL, LARGE = 512, 2048  # tokens of the two micro-batches that are measured
MOST = 16_384  # beyond this a larger micro-batch is no faster
RESERVE = 0.1  # of the free memory, for what the allocator cannot use

Steps = Sequence[Sequence[int]]


def preflight(
    engine: Engine, optimizer: torch.optim.Optimizer, steps: Steps, eval_indices: Sequence[int],
    pause: Callable[[], None], *, memory: DeviceMemory | None, find_budget: bool,
) -> None:  # fmt: skip
    """Run what the steps to come cost most, so that what does not fit fails now and not hours later.

    Adapter, optimizer, random states and reference stay as they were; `engine.max_tokens` becomes a budget that fits,
    found by measuring where `find_budget` and there is a `memory` to read. `pause` may raise to stop.

    Raises:
        torch.OutOfMemoryError: a pair does not fit even alone.
    """
    rng, was_training = rng_states(), engine.model.training
    try:
        for parameter in trainable_parameters(engine.model):
            parameter.grad = torch.zeros_like(parameter)  # as in every micro-batch but the first of a step
        with allocated_state(optimizer):
            if find_budget and memory is not None:
                engine.max_tokens = measure_budget(engine, steps, pause, memory)
            try_dearest(engine, steps, eval_indices, pause)
    finally:
        engine.model.zero_grad(set_to_none=True)
        engine.model.train(was_training)
        restore_rng_states(rng)
        if memory is not None:
            memory.start()  # the run's own peak is logged, not this one


@contextmanager
def allocated_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within this block the optimizer holds the memory that it will hold from its first step on."""
    groups = optimizer.param_groups
    if any(optimizer.state.values()):  # a continued run
        yield
    elif hasattr(optimizer, "init_state"):
        # bitsandbytes: what its first step would do. It never gives paged memory back, so this state is kept.
        for number, group in enumerate(groups):
            for place, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, number, place)
        yield
    else:
        # A step with zero gradients and learning rate 0 allocates everything and moves nothing. Its state is dropped,
        # because the first real step must find none: it would count itself as the second.
        try:
            _step_in_place(optimizer)
            yield
        finally:
            optimizer.state.clear()


def _step_in_place(optimizer: torch.optim.Optimizer) -> None:
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        optimizer.step()
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def measure_budget(engine: Engine, steps: Steps, pause: Callable[[], None], memory: DeviceMemory) -> int:
    """The largest token budget that leaves a reserve free, by the memory that two micro-batches of real pairs take."""
    small = filled(engine, steps, SMALL)
    large = filled(engine, steps, max(LARGE, 2 * engine.cost(small)))
    measured: dict[int, int] = {}
    with suppress(torch.OutOfMemoryError):
        for members in (small, small, large):  # the first also pays for what libraries allocate once
            memory.start()
            _alone(engine, members).accumulate_gradient(members, pause)
            measured[engine.cost(members)] = memory.grown()
        memory.start()
        budget = fitting_budget(measured, memory.free())
        print(
            f"{budget} tokens go through the model at once ({memory.free() / 2**30:.1f} GiB are free for them)",
            file=sys.stderr,
        )
        return budget
    return LARGE  # too much already: it is halved when it is tried


def fitting_budget(measured: Mapping[int, int], free: int) -> int:
    """The budget whose memory, on the line through the smallest and the largest of `measured` (bytes by tokens), is
    what `free` bytes leave after the reserve."""
    (few, least), (many, most) = min(measured.items()), max(measured.items())
    if many == few or most <= least:  # all the pairs in one micro-batch cost next to nothing
        return MOST
    per_token = (most - least) / (many - few)
    fixed = least - per_token * few
    return max(1, min(MOST, int(((1 - RESERVE) * free - fixed) / per_token)))


def filled(engine: Engine, steps: Steps, tokens: int) -> list[int]:
    """Pairs of the first steps that together cost at most `tokens`; at least one, or one group of a coupled loss."""
    members: list[int] = []
    for group in (group for step in steps for group in engine.groups(step)):
        if members and engine.cost([*members, *group]) > tokens:
            break
        members += group
    return members


def try_dearest(engine: Engine, steps: Steps, eval_indices: Sequence[int], pause: Callable[[], None]) -> None:
    """Train on the dearest micro-batches of all steps, then evaluate the dearest held-out one if it is larger still;
    the budget is halved until they fit."""
    trained = _halve_until_it_fits(
        engine,
        lambda: dearest(engine, steps, pause),
        lambda members: _alone(engine, members).accumulate_gradient(members, pause),
    )
    largest = max(map(engine.cost, trained))
    _halve_until_it_fits(
        engine,
        lambda: [part for part in dearest(engine, [eval_indices], pause)[:1] if engine.cost(part) > largest],
        lambda members: _alone(engine, members).evaluate(members, pause),
    )


def dearest(engine: Engine, steps: Steps, pause: Callable[[], None]) -> list[list[int]]:
    """Of all micro-batches of these steps the one with the most tokens and, where it is another, the one with the
    longest pair; nothing where there are no pairs."""
    largest: tuple[int, list[int]] = (0, [])
    longest: tuple[int, int, list[int]] = (0, 0, [])
    for step in steps:
        pause()
        for members in engine.micro_batches(step):
            tokens = engine.cost(members)
            largest = max(largest, (tokens, members))
            longest = max(longest, (max(engine.cost([member]) for member in members), tokens, members))
    found = [largest[-1]] if largest[-1] == longest[-1] else [largest[-1], longest[-1]]
    return [members for members in found if members]


def _halve_until_it_fits(
    engine: Engine, find: Callable[[], list[list[int]]], run: Callable[[list[int]], object]
) -> list[list[int]]:
    while True:
        micro_batches = find()
        with suppress(torch.OutOfMemoryError):
            for members in micro_batches:
                run(members)
            return micro_batches
        halve_budget(engine, micro_batches)


def _alone(engine: Engine, members: Sequence[int]) -> Engine:
    """An engine that runs these pairs as one micro-batch in this process alone, and remembers nothing of it."""
    return replace(engine, reference=engine.reference.blank(), max_tokens=engine.cost(members), ranks=ALONE)
