"""`plaintext`: a prompt and two answers, each a text (Trinity-RFT, Human-Like-DPO)."""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import check_texts_only
from qlora_dpo.data.pair_formats import messages
from qlora_dpo.data.pair_formats.hh_rlhf import holds_dialogues
from qlora_dpo.data.pair_formats.layout import text_pair, text_prompt
from qlora_dpo.data.preferences import ColumnNames, NoPlaceError, ParsedPair, PreferencePair
from qlora_dpo.data.values import Values, all_text, text_of

COLUMNS = "prompt, chosen, rejected (text)"
EXAMPLE: dict[str, Any] = {"prompt": "What is 2 + 3?", "chosen": "5", "rejected": "6"}


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form."""
    return names.prompt, names.chosen, names.rejected


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    return all_text(values, names.prompt, names.chosen, names.rejected) and not holds_dialogues(values, names)


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row; one of messages, which were saved as text, is read as such. Raises: RowError."""
    if any(isinstance(values.get(column), (list, dict)) for column in reads(names)):
        return messages.parse(values, names)
    prompt = text_prompt(values, names.prompt)
    chosen, rejected = text_of(values, names.chosen), text_of(values, names.rejected)
    return text_pair(prompt, chosen, rejected)


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row. Raises: RowError when the prompt is more than one user message."""
    check_texts_only(pair)
    return {"prompt": single_text(pair), "chosen": pair.chosen, "rejected": pair.rejected}


def single_text(pair: PreferencePair) -> str:
    """Return the prompt of a pair whose prompt is one user message.

    Raises:
        RowError: when there is a system prompt, or there are earlier turns.
    """
    *before, last = pair.messages
    if before and before[0]["role"] == "system":
        raise NoPlaceError("prompt", "a system prompt", "system")
    if before:
        raise NoPlaceError("prompt", "earlier turns", "history")
    return last["content"]
