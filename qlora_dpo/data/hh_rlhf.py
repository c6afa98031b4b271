"""Dialogues as Anthropic's hh-rlhf writes them, cut into turns.

Rules: white space around a turn and before the first marker is no part of it; two turns of one speaker in a
row become one, joined with a blank line (a repair); all else that is not Human, Assistant, Human, ... is
refused.
"""

from __future__ import annotations

import re

from qlora_dpo.data.preferences import Message, RowError

JOINED_TURNS = "two turns in a row by the same speaker, joined with a blank line"

# Begins with a plain character, which makes the search five times faster; a \r before it is stripped anyway.
_MARKER = re.compile(r"\n\r?\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_dialogue(field: str, text: str) -> tuple[list[Message], bool]:
    """Cut one dialogue into its turns, the last of which is the answer.

    Returns the turns and whether turns had to be joined.

    Raises:
        RowError: when the text is not a dialogue that ends with an answer.
    """
    before, *pieces = _MARKER.split("\n\n" + text.strip())
    if before.strip():
        raise RowError(field, f"text before the first marker ({len(before.strip())} characters)")
    if not pieces:
        raise RowError(field, "holds no dialogue")
    speakers, texts = pieces[0::2], [piece.strip() for piece in pieces[1::2]]
    if speakers[0] != "Human":
        raise RowError(field, "the dialogue does not start with Human")
    if speakers[-1] != "Assistant":
        raise RowError(field, "the dialogue ends with Human, so there is no answer")
    _refuse_empty_turns(field, texts)
    return _join_repeated(speakers, texts)


def common_history(chosen: list[Message], rejected: list[Message]) -> tuple[Message, ...]:
    """Return the turns before the answers.

    Raises:
        RowError: when the two histories are not the same.
    """
    if chosen[:-1] == rejected[:-1]:
        return tuple(chosen[:-1])
    shorter = min(len(chosen), len(rejected)) - 1
    turn = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter) + 1
    raise RowError("rejected", f"its history differs from that of chosen (turn {turn})")


def _refuse_empty_turns(field: str, texts: list[str]) -> None:
    if not texts[-1]:
        raise RowError(field, "the answer is empty")
    for number, text in enumerate(texts, 1):
        if not text:
            raise RowError(field, f"a turn of the history is empty (turn {number})")


def _join_repeated(speakers: list[str], texts: list[str]) -> tuple[list[Message], bool]:
    turns: list[Message] = []
    for speaker, text in zip(speakers, texts, strict=True):
        role = _ROLES[speaker]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text
        else:
            turns.append({"role": role, "content": text})
    return turns, len(turns) < len(texts)
