"""Keeps keys and passwords out of what is written or shown."""

from __future__ import annotations

import os
import re
from typing import Any

from qlora_dpo.errors import UsageError

HIDDEN = "***"
SHAPES = (
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), HIDDEN),  # https://user:password@host
    (re.compile(r"(?i)([?&][\w-]*(?:token|key|secret|password|signature)[\w-]*=)[^&\s]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)(\bbearer\s+)[\w.~+/-]{8,}"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|glpat-)[\w-]{16,}"), HIDDEN),
)
SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
SHORTEST = 8  # of a variable's value: a shorter one is found in innocent words


def redacted(text: str) -> str:
    """`text` without what looks like a key or a password, or is the value of a variable that is named like one."""
    for value in _values_of_secrets():
        text = text.replace(value, HIDDEN)
    for shape, replacement in SHAPES:
        text = shape.sub(replacement, text)
    return text


def refuse_secrets(options: dict[str, Any]) -> None:
    """Options are no place for a secret: `ps` shows them, and a run writes them down in several files.

    Raises:
        UsageError: naming the option that holds one, without showing it.
    """
    for name, value in options.items():
        shown = redacted(str(value))
        if shown != str(value):
            raise UsageError(
                f"--{name} holds a secret ({shown}), and options are shown by ps and written to config.yaml, the model "
                "card and the trackers. Leave it out: libraries read secrets from the environment (HF_TOKEN, "
                "WANDB_API_KEY, OPENAI_API_KEY)."
            )


def _values_of_secrets() -> list[str]:
    """Values of the environment's secrets, the longest first; a path is not one, although SSL_KEY may name it."""
    values = {value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    return sorted((value for value in values if len(value) >= SHORTEST and value[0] not in "/~."), key=len)[::-1]
