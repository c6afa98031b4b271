"""`orca`: a question, a system prompt and two answers, each a text (Intel's orca_dpo_pairs, distilabel's)."""

from __future__ import annotations

from typing import Any

from qlora_dpo.data.pair_formats.hh_rlhf import holds_dialogues
from qlora_dpo.data.pair_formats.layout import text_pair, text_prompt
from qlora_dpo.data.preferences import ColumnNames, ParsedPair
from qlora_dpo.data.values import Values, all_text, text_of

COLUMNS = "question or input, chosen, rejected (text), system"
EXAMPLE: dict[str, Any] = {
    "system": "Answer with a number.",
    "question": "What is 2 + 3?",
    "chosen": "5",
    "rejected": "6",
}
_OTHER_QUESTIONS = ("instruction", "messages", "conversations")


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    is_elsewhere = any(column in values for column in (names.prompt, *_OTHER_QUESTIONS))
    texts = all_text(values, _question_column(values), names.chosen, names.rejected)
    return texts and not is_elsewhere and not holds_dialogues(values, names)


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form; `system` belongs to every form."""
    return "question", "input", names.chosen, names.rejected


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    column = _question_column(values)
    prompt = text_prompt(values, column, "input" if column == "question" else None)
    return text_pair(prompt, text_of(values, names.chosen), text_of(values, names.rejected))


def _question_column(values: Values) -> str:
    return "question" if "question" in values else "input"
