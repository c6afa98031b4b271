"""Watches whether the run makes the very answers that it should prefer less likely, and does what was asked for then.

DPO rewards only the difference of two log-probs, so both may fall while loss and accuracy look fine; what becomes
likelier instead is in neither answer, and can be the opposite of what was meant: likelihood displacement (Razin et
al., arXiv 2410.08847; with similar answers, Pal et al., arXiv 2402.13228). A slight fall is normal, because a model
that was fine-tuned on the chosen answers can only lose there.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from tqdm import tqdm

from qlora_dpo.errors import TrainingError
from qlora_dpo.objectives.metrics import CHOSEN_SHIFT
from qlora_dpo.objectives.objective import Objective
from qlora_dpo.training.engine import Engine
from qlora_dpo.training.folder.checkpoints import rng_states
from qlora_dpo.training.folder.saving import Saver

LIMIT = -0.1
"""Nats per token, against the reference. The sources give no number. At this one the perplexity of the chosen answers
is 10.5 % above the reference's and an answer of 100 tokens has become exp(10) = 22 000 times less likely; per token,
so that it means the same for short and long answers."""
MEMORY = 10
"""Steps that the smoothing remembers, so that one odd batch decides nothing."""
NLL_WEIGHT = 1.0
"""Of the NLL term that --on_displacement nll adds: the alpha that the paper on it uses (RPO, arXiv 2404.19733)."""

Mode = Literal["warn", "nll", "stop"]


class Guard(Protocol):
    """What follows a run's metrics from step to step."""

    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...
    def observe(self, number: int, metrics: dict[str, float]) -> dict[str, float]: ...
    def check(self, number: int, saver: Saver) -> None: ...


class NoGuard:
    """Follows nothing: without a reference nothing can fall against it."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""

    def observe(self, number: int, metrics: dict[str, float]) -> dict[str, float]:
        return {}

    def check(self, number: int, saver: Saver) -> None:
        """Nothing to end the run for."""


@dataclass
class DisplacementGuard:
    """Follows the smoothed shift of the chosen answers; its state is part of every checkpoint.

    It acts when the shift falls below the limit, and again each time when the fall has doubled.
    """

    engine: Engine
    mode: Mode
    smoothed: float = 0.0  # where every run starts: an untrained policy is the reference
    limit: float = LIMIT
    has_fallen: bool = False
    _asked: Objective = field(init=False)
    _verdict: str | None = None

    def __post_init__(self) -> None:
        assert isinstance(self.engine.objective, Objective)
        self._asked = self.engine.objective

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for an exact continuation."""
        return {"displacement": {"smoothed": self.smoothed, "limit": self.limit, "has_fallen": self.has_fallen}}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's trainer state; one without a guard's state changes nothing."""
        ours = state.get("displacement", {})
        self.smoothed = ours.get("smoothed", self.smoothed)
        self.limit = ours.get("limit", self.limit)
        self.has_fallen = ours.get("has_fallen", self.has_fallen)
        self._set_objective()

    def observe(self, number: int, metrics: dict[str, float]) -> dict[str, float]:
        """Take in the metrics of a finished step, which may change the objective of the next; returns what to log."""
        shift = metrics[CHOSEN_SHIFT]
        logged = {"displacement/nll_weight": NLL_WEIGHT * self._holds_up} if self.mode == "nll" else {}
        if math.isfinite(shift):  # what is not is complained about elsewhere, and would stay in the mean for ever
            self.smoothed += (shift - self.smoothed) / MEMORY
        if self.smoothed <= self.limit:
            self._act(number)
        return {"displacement/smoothed": self.smoothed} | logged

    def check(self, number: int, saver: Saver) -> None:
        """With --on_displacement stop: end the run after step `number` if its chosen answers have fallen.

        Raises:
            TrainingError: they have; a checkpoint is written first.
        """
        if self._verdict is not None:
            saver.save_now(number, rng_states())
            raise TrainingError(
                f"{self._verdict} checkpoint-{number} is written: the same command continues until the fall has "
                "doubled, or say what to change and allow it (--on_displacement nll --allow_changed on_displacement)."
            )

    @property
    def _holds_up(self) -> bool:
        return self.mode == "nll" and self.has_fallen

    def _set_objective(self) -> None:
        self.engine.objective = self._asked.with_term("sft", NLL_WEIGHT) if self._holds_up else self._asked

    def _act(self, number: int) -> None:
        fall = (
            f"at step {number} each token of the chosen answers is {-self.smoothed:.2f} nats less likely than under "
            f"the reference, in the mean of about {MEMORY} steps (likelihood displacement, arXiv 2410.08847): "
        )
        switches = self.mode == "nll" and not self.has_fallen
        self.has_fallen = True
        while self.smoothed <= self.limit:
            self.limit *= 2
        if self.mode == "stop":
            self._verdict = fall + self._advice()
        elif switches:
            self._set_objective()
            _warn(f"{fall}from the next step on their NLL is added to the loss with weight {NLL_WEIGHT:g}.")
        else:
            _warn(fall + self._advice())

    def _advice(self) -> str:
        """What to change, given what the run does already."""
        names = self._asked.names
        with_sft = f"--loss_type {','.join([*names, 'sft'])}"
        if "sft" in names:
            hold_up = "raise the weight of sft in --loss_weights"
        elif self.mode == "nll":
            hold_up = f"use {with_sft} from the first step on"
        else:
            hold_up = f"hold them up with {with_sft} or --on_displacement nll"
        return f"lower --learning_rate, raise --beta, or {hold_up}."


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
