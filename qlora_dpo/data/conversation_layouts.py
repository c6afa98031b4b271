"""How other data sets and tools lay out rows of SFT data, an entry of `LAYOUTS` each: a question and its answer under
other names, or a dialogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.messages import messages_of
from qlora_dpo.data.pair_formats.hh_rlhf import DIALOGUE, answer_in_dialogue
from qlora_dpo.data.pair_formats.layout import text_prompt
from qlora_dpo.data.preferences import Message, RowError
from qlora_dpo.data.values import Values, clean_text, is_empty, value_of

Read = tuple[list[Message], tuple[str, ...]]
"""Messages, and the repairs that made them usable."""


@dataclass(frozen=True, slots=True)
class ConversationLayout:
    """One layout: a row of it has all columns of `needs`, and none of `without`."""

    columns: str
    example: dict[str, Any]
    needs: tuple[str, ...]
    read: Callable[[Values], Read]
    also: tuple[str, ...] = ()
    """Further columns that it reads; `history`, `system` and `tools` belong to every format."""
    without: tuple[str, ...] = ()

    def matches(self, values: Values) -> bool:
        """Tell by its columns whether a row has this form."""
        return all(column in values for column in self.needs) and not any(column in values for column in self.without)


def _answered(question: str, answer: str, *, more: str | None = None) -> Callable[[Values], Read]:
    return lambda values: read_answered(values, question, answer, more)


def read_answered(values: Values, question: str, answer: str, more: str | None = None) -> Read:
    """A question, with the text of the column `more` on a line of its own behind it, and its answer.

    Each of the two is a text or messages (TRL); the text of the question may be a dialogue.

    Raises:
        RowError: when one of them is empty, or neither.
    """
    said = value_of(values, answer)
    if is_empty(values.get(question)) and isinstance(said, list) and len(said) > 1:  # the whole dialogue
        return messages_of(answer, said), ()
    if not isinstance(values.get(question), (list, dict)):
        prompt = text_prompt(values, question, more)
        messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
        is_dialogue = not isinstance(prompt, str)
    else:
        messages, is_dialogue = messages_of(question, values[question]), False
        if more and not is_empty(values.get(more)):
            raise RowError(more, f"has no place beside messages in {question}")
    if isinstance(said, (list, dict)):
        return [*messages, *messages_of(answer, said)], ()
    said = clean_text(answer, said)
    said = answer_in_dialogue(said) if is_dialogue else said
    if not said.strip():
        raise RowError(answer, "the answer is empty")
    return [*messages, {"role": "assistant", "content": said}], (DIALOGUE,) if is_dialogue else ()


def _read_conversations(values: Values) -> Read:
    return messages_of("conversations", value_of(values, "conversations"), may_end_empty=True), ()


_ASKED, _SAID = "What is 2 + 3?", "5"
_PAIRED = ("chosen", "rejected", "rejected_response")

LAYOUTS: dict[str, ConversationLayout] = {
    "sharegpt": ConversationLayout(
        "conversations (messages with from and value), system, tools",
        {"conversations": [{"from": "human", "value": _ASKED}, {"from": "gpt", "value": _SAID}]},
        ("conversations",),
        _read_conversations,
        without=_PAIRED,
    ),
    "alpaca": ConversationLayout(
        "instruction, input, output (text), history, system",
        {"instruction": _ASKED, "input": "", "output": _SAID},
        ("instruction", "output"),
        _answered("instruction", "output", more="input"),
        also=("input",),
        without=_PAIRED,
    ),
    "dolly": ConversationLayout(
        "instruction, context, response (text)",
        {"instruction": _ASKED, "context": "", "response": _SAID},
        ("instruction", "response"),
        _answered("instruction", "response", more="context"),
        also=("context",),
        without=(*_PAIRED, "output"),
    ),
    "completion": ConversationLayout(
        "prompt, completion (text or messages)",
        {"prompt": _ASKED, "completion": _SAID},
        ("prompt", "completion"),
        _answered("prompt", "completion"),
        without=_PAIRED,
    ),
    "query": ConversationLayout(
        "query, response (text), history, system",
        {"query": _ASKED, "response": _SAID},
        ("query", "response"),
        _answered("query", "response"),
        without=_PAIRED,
    ),
    "openorca": ConversationLayout(
        "question, response (text), system_prompt",
        {"system_prompt": "Be brief.", "question": _ASKED, "response": _SAID},
        ("question", "response"),
        _answered("question", "response"),
        without=_PAIRED,
    ),
    "question": ConversationLayout(
        "question, answer (text)",
        {"question": _ASKED, "answer": _SAID},
        ("question", "answer"),
        _answered("question", "answer"),
        without=_PAIRED,
    ),
}
