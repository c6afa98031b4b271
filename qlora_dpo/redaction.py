"""Keeps keys and passwords out of what is written or shown."""

from __future__ import annotations

import os
import re
from typing import Any

from qlora_dpo.errors import UsageError

HIDDEN = "***"


def _word(start: str, rest: str) -> str:
    """A word that begins so; the literal stands before the look at what precedes it, which is ten times as fast."""
    return rf"{start}(?<=\b{start}){rest}"


# (what it is, how it looks, what is written instead). What stands in quotes ends there: these also read JSON.
SHAPES = tuple(
    (kind, re.compile(shape), replacement)
    for kind, shape, replacement in (
        ("a URL with a user's password", r"""(?<=://)[^/\s@"'<>`]+(?=@)""", HIDDEN),
        (
            "a URL with a key",
            r"""(?i)([?&][\w-]*(?:token|key|secret|password|signature)[\w-]*=)[^&\s"'<>`]+""",
            rf"\1{HIDDEN}",
        ),
        (
            "a bearer token",
            r"(?i)(\bbearer\s+)(?:(?=[\w.~+/-]*\d)[\w.~+/-]{8,}|[\w.~+/-]{20,})",
            rf"\1{HIDDEN}",
        ),
        (
            "a private key",
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----)?",
            HIDDEN,
        ),
        ("a Hugging Face token", _word("hf_", r"[\w-]{16,}"), HIDDEN),
        ("an API key (sk-)", _word("sk-", r"[\w-]{16,}"), HIDDEN),
        ("a GitHub token", _word("gh[pousr]_", r"[\w-]{16,}") + "|" + _word("github_pat_", r"\w{22,}"), HIDDEN),
        ("a GitLab token", _word("glpat-", r"[\w-]{16,}"), HIDDEN),
        ("an AWS access key", _word("A(?:KI|SI)A", r"[0-9A-Z]{16}\b"), HIDDEN),
        ("a ModelScope token", _word("ms-", r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b"), HIDDEN),
        ("a Google API key", _word("AIza", r"[\w-]{35}"), HIDDEN),
        ("a Slack token", _word("xox[abprs]-", r"[\w-]{10,}"), HIDDEN),
        (
            "a Groq, NVIDIA or wandb key",
            "|".join(_word(start, r"[\w-]{16,}") for start in ("gsk_", "nvapi-", "wandb_v1_")),
            HIDDEN,
        ),
        ("a JSON web token", _word("eyJ", r"[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"), HIDDEN),
        (
            "a value that is named as a key",  # wandb's keys are 40 hex digits, as a commit is
            r"""(?i)((?:api|access|secret|private)[_-]?(?:key|token)(?:_id)?|auth[_-]?token|client[_-]?secret|passwd"""
            r"""|password)(["']?\s*[:=]\s*["']?|\s+)(?=[\w.~+/=-]*\d)[\w.~+/=-]{12,}""",
            rf"\1\2{HIDDEN}",
        ),
    )
)
SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
SHORTEST = 8  # of a variable's value: a shorter one is found in innocent words


def redacted(text: str) -> str:
    """`text` without what looks like a key or a password, or is the value of a variable that is named like one."""
    for _, value in _named_secrets():
        text = text.replace(value, HIDDEN)
    for _, shape, replacement in SHAPES:
        text = shape.sub(replacement, text)
    return text


def secrets_in(text: str) -> list[tuple[int, str]]:
    """(place, what it is) of all that `redacted` would hide, in order."""
    found = [(match.start(), kind) for kind, shape, _ in SHAPES for match in shape.finditer(text)]
    for name, value in _named_secrets():
        found += [(match.start(), f"the value of ${name}") for match in re.finditer(re.escape(value), text)]
    return sorted(found)


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


def _named_secrets() -> list[tuple[str, str]]:
    """(name, value) of the environment's, the longest first; a path is no secret, although SSL_KEY may name it."""
    named = [(name, value) for name, value in os.environ.items() if SECRET_NAMES.search(name)]
    secrets = [(name, value) for name, value in named if len(value) >= SHORTEST and value[0] not in "/~."]
    return sorted(secrets, key=lambda secret: len(secret[1]), reverse=True)
