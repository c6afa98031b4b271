"""`alpaca`: instruction and input, two answers, earlier turns as pairs of texts, a system prompt
(LLaMA-Factory's ranking data).
"""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import check_texts_only, check_turns
from qlora_dpo.data.pair_formats.hh_rlhf import holds_dialogues
from qlora_dpo.data.pair_formats.layout import text_pair, text_prompt
from qlora_dpo.data.preferences import ColumnNames, NoPlaceError, ParsedPair, PreferencePair
from qlora_dpo.data.values import Values, all_text, text_of

COLUMNS = "instruction, input, chosen, rejected (text), history (pairs of texts), system"
EXAMPLE: dict[str, Any] = {
    "instruction": "What is 2 + 3?",
    "input": "",
    "chosen": "5",
    "rejected": "6",
    "system": "Answer with a number.",
    "history": [["Hello", "Hi"]],
}


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form; `history` and `system` belong to every form."""
    return "instruction", "input", names.chosen, names.rejected


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    texts = all_text(values, "instruction", names.chosen, names.rejected)
    return texts and names.prompt not in values and not holds_dialogues(values, names)


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    prompt = text_prompt(values, "instruction", "input")
    return text_pair(prompt, text_of(values, names.chosen), text_of(values, names.rejected))


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row. Raises: RowError when user and assistant do not take turns, or the system prompt is empty."""
    check_texts_only(pair)
    check_turns("prompt", pair.messages)
    *before, last = pair.messages
    row: dict[str, Any]
    row = {"instruction": last["content"], "input": "", "chosen": pair.chosen, "rejected": pair.rejected}
    if before and before[0]["role"] == "system":
        row["system"] = before.pop(0)["content"]
        if not row["system"]:
            raise NoPlaceError("prompt", "an empty system prompt", "system")
    if before:
        texts = [message["content"] for message in before]
        row["history"] = [list(turn) for turn in zip(texts[0::2], texts[1::2], strict=True)]
    return row
