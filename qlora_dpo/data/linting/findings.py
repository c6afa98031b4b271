"""What a rule of `data lint` is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from qlora_dpo.terminal import visible

Check = TypeVar("Check", bound=Callable[..., Any])


@dataclass(frozen=True)
class Rule(Generic[Check]):
    """A row of a table of rules: an error blocks, a warning does not."""

    name: str
    severity: Literal["error", "warning"]
    looks_at: str
    advice: str
    check: Check
    tolerated: float = 0.0
    """Share of the rows up to which an error does not block; public data sets have a few of some."""
    of_held_out: bool = False
    """The share is one of the held-out rows."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule says about one row, or about a file."""

    origin: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return visible(f"{self.origin}: {self.rule}: {self.detail}")
