"""How other data sets and tools lay out rows of SFT data, an entry of `LAYOUTS` each: a question and its answer under
other names, or a dialogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.messages import messages_of
from qlora_dpo.data.preferences import Message, RowError
from qlora_dpo.data.values import Values, optional_text_of, text_of, value_of


@dataclass(frozen=True, slots=True)
class ConversationLayout:
    """One layout: a row of it has all columns of `needs`, and none of `without`."""

    columns: str
    example: dict[str, Any]
    needs: tuple[str, ...]
    read: Callable[[Values], list[Message]]
    also: tuple[str, ...] = ()
    """Further columns that it reads; `history`, `system` and `tools` belong to every format."""
    without: tuple[str, ...] = ()

    def matches(self, values: Values) -> bool:
        """Tell by its columns whether a row has this form."""
        return all(column in values for column in self.needs) and not any(column in values for column in self.without)


def _answered(question: str, answer: str, *, more: str | None = None) -> Callable[[Values], list[Message]]:
    """Reads a question, with a line break and the text of the column `more` behind it, and its answer."""

    def read(values: Values) -> list[Message]:
        parts = [text_of(values, question), optional_text_of(values, more) if more else ""]
        asked = "\n".join(part for part in parts if part)
        said = text_of(values, answer)
        for column, text in ((question, asked), (answer, said)):
            if not text.strip():
                raise RowError(column, "the text is empty")
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    return read


def _read_completion(values: Values) -> list[Message]:
    """Prompt and completion, each a text or messages (TRL)."""
    messages: list[Message] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = value_of(values, column)
        messages += messages_of(column, {"role": role, "content": value} if isinstance(value, str) else value)
    return messages


def _read_conversations(values: Values) -> list[Message]:
    return messages_of("conversations", value_of(values, "conversations"), may_end_empty=True)


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
        _read_completion,
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
