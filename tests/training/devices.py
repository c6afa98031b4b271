"""A device that runs out of memory, made of a real scorer and a count of tokens."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from qlora_dpo.models.scoring import Scorer


@dataclass
class FakeDevice:
    """Scores as `inner` does, with memory linear in tokens; also the reader of that memory.

    It is full above `capacity` bytes, and at the calls numbered in `full_at`, counted from 1 over the policy's
    micro-batches (the reference's calls are not counted).
    """

    inner: Scorer
    capacity: float = float("inf")
    fixed: int = 0
    per_token: int = 1
    full_at: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    """Of every micro-batch of the policy that was asked for."""
    graph: weakref.ref[torch.Tensor] | None = None
    """The log-probs of the micro-batch that failed."""
    graphs_alive_at_retry: list[bool] = field(default_factory=list)
    most: int = 0

    @property
    def kind(self) -> Any:
        return self.inner.kind

    def per_token_logps(self, model: Any, batch: Any) -> torch.Tensor:
        return self.inner.per_token_logps(model, batch)

    def per_token_logps_and_squares(self, model: Any, batch: Any, *, with_squares: bool = True) -> Any:
        if self.graph is not None:
            self.graphs_alive_at_retry.append(self.graph() is not None)
            self.graph = None
        count = batch.input_ids.numel()
        self.tokens.append(count)
        result = self.inner.per_token_logps_and_squares(model, batch, with_squares=with_squares)
        needed = self.fixed + self.per_token * count
        if needed > self.capacity or len(self.tokens) in self.full_at:
            self.graph = weakref.ref(result[0])
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.most = max(self.most, needed)
        return result

    def start(self) -> None:
        self.most = 0

    def grown(self) -> int:
        return self.most

    def free(self) -> int:
        return int(self.capacity)
