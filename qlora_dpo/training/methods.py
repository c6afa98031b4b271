"""What an optimizer step learns from: preference pairs against a reference (DPO), or the assistant's turns (SFT).

Each objective has a method: how it reads a micro-batch, what it logs, and what its samples are called. The loop, the
cutting and the packing are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from qlora_dpo.data.packing import pack, target_count
from qlora_dpo.objectives.metrics import preference_metrics
from qlora_dpo.objectives.objective import Objective
from qlora_dpo.objectives.supervised import SupervisedObjective, token_metrics

if TYPE_CHECKING:
    from qlora_dpo.training.engine import Engine


@dataclass(frozen=True)
class Learned:
    """A micro-batch's share of the step's loss, and what is logged: values, each a row, and the sample that each
    number of a row belongs to."""

    loss: Tensor
    values: dict[str, Tensor]
    owners: Sequence[int]


@dataclass(frozen=True)
class Method:
    """One objective's part in the engine and the loop."""

    title: str
    unit: str
    """What its samples are called."""
    learn: Callable[[Engine, list[int], Sequence[int]], Learned]
    """Score some members of a step, all of whose indices are known too."""
    counted: str | None = None
    """The name under which the number of logged values is logged."""


def learn_preferences(engine: Engine, members: list[int], step: Sequence[int]) -> Learned:
    """The losses of pairs; a step's loss is their mean."""
    assert isinstance(engine.objective, Objective)
    objective, pairs = engine.objective, engine.statistics(members, step)
    losses = objective(pairs)
    values = preference_metrics(
        losses, pairs, objective.beta,
        has_reference=objective.has_reference, averages_rewards=objective.averages_rewards,
    )  # fmt: skip
    return Learned(losses.sum() / len(step), values, members)


def learn_turns(engine: Engine, members: list[int], step: Sequence[int]) -> Learned:
    """The NLL of supervised tokens; a step's loss is their mean, whatever conversations they stand in."""
    assert isinstance(engine.objective, SupervisedObjective)
    batch = pack([engine.pairs[index] for index in members], engine.scorer.kind).to(engine.device)
    logps, is_likeliest = engine.scorer.per_token_logps_and_hits(engine.model, batch)
    tokens_of_step = sum(target_count(engine.pairs[index]) for index in step)
    owners = [member for member, count in zip(members, batch.completion_lengths, strict=True) for _ in range(count)]
    return Learned(engine.objective(logps, tokens_of_step), token_metrics(logps, is_likeliest), owners)


METHODS: dict[type, Method] = {
    Objective: Method("DPO", "pairs", learn=learn_preferences),
    SupervisedObjective: Method("SFT", "conversations", learn=learn_turns, counted="supervised_tokens"),
}
