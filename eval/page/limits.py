"""What a visitor may ask for; checked on the server, whatever the page sent."""

from __future__ import annotations

import math
from typing import Any

from eval.page.words import Words

MAX_PROMPT_CHARACTERS = 8000
LONGEST_PROMPT = 2048  # tokens
MAX_SECONDS = 120.0  # of one answer
MAX_TEMPERATURE = 2.0


class Refused(Exception):
    """What was asked for is not done; the text says why, in the visitor's language."""


def prompt_of(value: Any, words: Words) -> str:
    """The prompt, stripped.

    Raises:
        Refused: there is none, it is too long, or it is no text.
    """
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise Refused(words("ask_first"))
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise Refused(words("too_long", count=f"{len(text):,}", most=f"{MAX_PROMPT_CHARACTERS:,}"))
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(words("not_encodable")) from None
    return text


def number_of(value: Any, low: float, high: float, default: float) -> float:
    """A number between these; the default where there is none."""
    found = value if isinstance(value, int | float) and math.isfinite(value) else default
    return max(low, min(float(found), high))
