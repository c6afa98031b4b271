"""Texts of models, data and people, made fit for a page."""

from __future__ import annotations

import re

from qlora_dpo.redaction import redacted

# Controls but tab and line feed, marks that turn the direction of writing, halves of surrogate pairs.
_UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")


def showable(text: str, longest: int) -> str:
    """The text without what a browser may not show, without keys and passwords, not longer than so many characters."""
    text = text if len(text) <= longest else text[:longest] + "…"
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", redacted(text.replace("\r\n", "\n")))
