"""Ways for workers of a Ray cluster that need no model: in a module of their own, which workers can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dpo.errors import DataError, ModelError
from qlora_dpo.reference.fill import Keep, Way, keys_of
from qlora_dpo.reference.identity import identity_of
from qlora_dpo.reference.store import ModelIdentity

DEADLY, REFUSED = 7, 8  # first tokens of prompts


def made_up(name: str = "made up") -> ModelIdentity:
    return identity_of({"weights": name}, {})


def _way(compute: Any, name: str = "made up") -> Way:
    return Way(made_up(name), compute)


def telling_pids(pairs: Sequence[Any]) -> Way:
    """Its log-probs are the id of the worker's process."""

    def compute(places: Sequence[int], keep: Keep) -> None:
        time.sleep(0.1)
        for place in places:
            pair = pairs[place]
            both = (pair.chosen_ids, pair.rejected_ids)
            keep({key: np.full(len(ids), -float(os.getpid()), "float32")
                  for key, ids in zip(keys_of(pair), both, strict=True)})  # fmt: skip

    return _way(compute)


def dying_and_refusing(marks: Path, pairs: Sequence[Any]) -> Way:
    """Kills its process when it is made, and again with the first deadly pair; computes all others but some, as servers
    do with rows that are too long."""
    inner = telling_pids(pairs).compute

    def die_once(mark: Path) -> None:
        if not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    def compute(places: Sequence[int], keep: Keep) -> None:
        if any(pairs[place].prompt_ids[0] == DEADLY for place in places):
            die_once(marks / "working")
        good = [place for place in places if pairs[place].prompt_ids[0] != REFUSED]
        inner(good, keep)
        if len(good) < len(places):
            raise DataError(f"{len(places) - len(good)} answers have no log-probs")

    die_once(marks / "loading")
    return _way(compute)


def differing(marks: Path, pairs: Sequence[Any]) -> Way:
    """The first worker has the model, the second one another; the first does nothing before there is a second."""
    try:
        (marks / "first").touch(exist_ok=False)
        name = "made up"
    except FileExistsError:
        (marks / "second").touch()
        name = "other weights"

    def compute(places: Sequence[int], keep: Keep) -> None:
        deadline = time.monotonic() + 120
        while not (marks / "second").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        telling_pids(pairs).compute(places, keep)

    return _way(compute, name)


def unloadable(pairs: Sequence[Any]) -> Way:
    raise ModelError("the model cannot be loaded: no such layer.")
