"""Texts of models and data sets in Markdown, where nothing in them may become a link, a picture or markup."""

from __future__ import annotations

import re
from typing import Any


def inline(value: Any) -> str:
    """A text within a line or a cell."""
    text = " ".join(str("" if value is None else value).split())
    return re.sub(r"([\\`*<>\[\]|!~])", r"\\\1", "".join(filter(str.isprintable, text)))


def code_block(text: str, language: str = "text") -> list[str]:
    """A text as a block that nothing in it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    shown = "".join(character for character in text if character in "\n\t" or character.isprintable())
    return [f"{fence}{language}", *shown.split("\n"), fence]
