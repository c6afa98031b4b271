"""`alpaca`: instruction and input, two answers, earlier turns as pairs of texts, a system prompt
(LLaMA-Factory's ranking data).
"""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.messages import Values, all_text, check_turns, clean_text, kind, optional_text_of, text_of
from qlora_dpo.data.pair_formats.hh_rlhf import holds_dialogues
from qlora_dpo.data.pair_formats.sharegpt import refuse_unsupported, with_system
from qlora_dpo.data.preferences import ColumnNames, Message, NoPlaceError, ParsedPair, PreferencePair, RowError

COLUMNS = "instruction, input, chosen, rejected (text), history (pairs of texts), system"
EXAMPLE: dict[str, Any] = {
    "instruction": "What is 2 + 3?",
    "input": "",
    "chosen": "5",
    "rejected": "6",
    "system": "Answer with a number.",
    "history": [["Hello", "Hi"]],
}


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    texts = all_text(values, "instruction", names.chosen, names.rejected)
    return texts and names.prompt not in values and not holds_dialogues(values, names)


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    refuse_unsupported(values)
    parts = (text_of(values, "instruction"), optional_text_of(values, "input"))
    prompt = "\n".join(part for part in parts if part)
    if not prompt.strip():
        raise RowError("instruction", "the prompt is empty")
    messages = [*history_of(values), Message(role="user", content=prompt)]
    pair = PreferencePair(
        tuple(with_system(values, messages)), text_of(values, names.chosen), text_of(values, names.rejected)
    )
    return ParsedPair(pair)


def history_of(values: Values) -> list[Message]:
    """The turns of the column `history`, pairs of texts.

    Raises:
        RowError: when it holds something else.
    """
    history = values.get("history") or []
    if not isinstance(history, list):
        raise RowError("history", f"must be a list of pairs of texts (it is {kind(history)})")
    messages: list[Message] = []
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError(f"history[{number}]", "must be a pair of texts, what the user and the assistant said")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            if not clean_text(f"history[{number}]", text).strip():
                raise RowError(f"history[{number}]", "an empty message")
            messages.append({"role": role, "content": text})
    return messages


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row. Raises: RowError when user and assistant do not take turns, or the system prompt is empty."""
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
