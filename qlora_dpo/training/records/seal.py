"""The seal of a card: a hash of its own text, which tells one that nobody edited from one that somebody did."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_SEAL = "<!-- written by qlora_dpo, {digest}: `release push` writes this card again, unless somebody edited it -->"
_SEALED = re.compile(_SEAL.replace("{digest}", "([0-9a-f]{16})"))
UNSEALED = _SEAL.format(digest="0" * 16)
"""The line of a card that `sealed` fills."""


def sealed(card: str) -> str:
    """A card with its hash where it has the line `UNSEALED`."""
    return card.replace(UNSEALED, _SEAL.format(digest=_digest(card)), 1)


def is_untouched(card: str) -> bool:
    """Whether a card was written by this tool and edited by nobody."""
    seal = _SEALED.search(card)
    return seal is not None and seal[1] == _digest(card.replace(seal[0], UNSEALED, 1))


def is_edited(file: Path) -> bool:
    """Whether there is a card that somebody wrote or edited."""
    return file.is_file() and not is_untouched(file.read_text(encoding="utf-8", errors="replace"))


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()[:16]
