"""The date that a chat template writes: one for a run and for every tokenized data set, whatever day it is.

Templates read the clock by `strftime_now` (Llama 3.2, gpt-oss, SmolLM3, Granite). The date is kept beside the cache the
first time a template asks for it, and in a run's folder.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ATTRIBUTE = "chat_template_date"
_CALL = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>[^"'\\]*)(?P=quote)\s*\)""")


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The chat template writes today's date, at least sometimes."""
    return "strftime_now" in str(tokenizer.chat_template)


def pin_date(tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
    """Let the template write this day (YYYY-MM-DD) instead of today; None lets it read the clock."""
    setattr(tokenizer, _ATTRIBUTE, date and _valid(date))


def pinned_date(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The day that the template writes; None where it reads the clock, or needs none."""
    date: str | None = getattr(tokenizer, _ATTRIBUTE, None)
    return date if reads_clock(tokenizer) else None


def dated_template(tokenizer: PreTrainedTokenizerBase, has_tools: bool = False) -> str | None:
    """The chat template with the pinned day written into it; None where the tokenizer's own needs no day.

    Raises:
        UsageError: the template asks for the date in a way that no day can be written into.
    """
    date = pinned_date(tokenizer)
    if date is None:
        return None
    day = datetime.datetime.fromisoformat(date)
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template["tool_use" if has_tools and "tool_use" in template else "default"]
    dated = _CALL.sub(lambda call: repr(day.strftime(call["form"])), template)
    if re.search(r"strftime_now\s*\(", dated):
        raise UsageError(
            "the chat template asks for today's date by a computed form, so every day would give other tokens. Write "
            "the form into its call of strftime_now, or choose another template with --prompt_template."
        )
    return dated


def recorded_date(tokenizer: PreTrainedTokenizerBase, cache: Path) -> str | None:
    """The day that this template's conversations were first written with on this machine: today, the first time.

    None where the template writes no date. A cache that cannot be written gives today.
    """
    if not reads_clock(tokenizer):
        return None
    name = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:32]
    file = cache / "template_dates" / name
    today = datetime.date.today().isoformat()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as new:
            new.write(today)
        return today
    except FileExistsError:
        return _valid(file.read_text(encoding="utf-8").strip()) or today
    except OSError:
        return today


def _valid(date: str) -> str | None:
    try:
        return datetime.date.fromisoformat(date).isoformat()
    except ValueError:
        return None
