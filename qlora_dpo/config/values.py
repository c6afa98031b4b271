"""Kinds of values that options have beyond text, numbers and paths."""

from __future__ import annotations


class Names(tuple[str, ...]):
    """A list of names; on the command line `a b` or `a,b`, in YAML a list or one string."""

    def __new__(cls, value: str | list[str] | tuple[str, ...] = ()) -> Names:
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        return super().__new__(cls, (str(part) for part in parts))


class Numbers(tuple[float, ...]):
    """A list of numbers; on the command line `1 0.2` or `1,0.2`, in YAML a list or one number."""

    def __new__(cls, value: str | float | list[float] | tuple[float, ...] = ()) -> Numbers:
        if isinstance(value, int | float):
            value = [value]
        parts = value.replace(",", " ").split() if isinstance(value, str) else value
        return super().__new__(cls, (float(part) for part in parts))
