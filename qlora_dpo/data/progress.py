"""A progress bar for what reads many rows."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def with_progress(items: Iterable[T], what: str, total: int | None = None, unit: str = " rows") -> Iterator[T]:
    """Show a bar on a terminal, and now and then a line in a log when it takes long."""
    from tqdm import tqdm

    seconds = 0.2 if sys.stderr.isatty() else 30
    yield from tqdm(items, desc=what, total=total, unit=unit, delay=seconds, mininterval=seconds, leave=False)
