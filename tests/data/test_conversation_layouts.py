"""How other data sets and tools lay out SFT rows, and which conversations they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from qlora_dpo.data.conversation_layouts import LAYOUTS
from qlora_dpo.data.conversations import (
    CONVERSATION_FORMATS,
    Conversation,
    ConversationColumns,
    detect_conversation_format,
    fitting_formats,
    parse_conversation,
)
from qlora_dpo.data.preferences import RowError
from qlora_dpo.errors import UsageError

NAMES = ConversationColumns()


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def turn(speaker: str, text: str, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": text, **more}


SYSTEM, Q, A = said("system", "s"), said("user", "q"), said("assistant", "a")
ROWS: list[tuple[str, Mapping[str, Any], list[dict[str, str]]]] = [
    ("alpaca", {"instruction": "q", "input": "", "output": "a", "text": "Below is ..."}, [Q, A]),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, [said("user", "q\ni"), A]),
    (
        "alpaca",
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["b", "c"]]},
        [SYSTEM, said("user", "b"), said("assistant", "c"), Q, A],
    ),
    (
        "dolly",
        {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"},
        [said("user", "q\nc"), A],
    ),
    ("dolly", {"instruction": "q", "context": "", "response": "a"}, [Q, A]),
    ("sharegpt", {"id": "1", "conversations": [turn("human", "q"), turn("gpt", "a")], "system": "s"}, [SYSTEM, Q, A]),
    (
        "sharegpt",  # SlimOrca
        {"conversations": [turn("system", "s", weight=None), turn("human", "q", weight=0), turn("gpt", "a", weight=1)]},
        [SYSTEM, Q, A],
    ),
    ("completion", {"prompt": "q", "completion": "a"}, [Q, A]),
    ("completion", {"prompt": [SYSTEM, Q], "completion": [A]}, [SYSTEM, Q, A]),
    ("query", {"query": "q", "response": "a", "type": "MATH"}, [Q, A]),
    ("openorca", {"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, Q, A]),
    ("question", {"question": "q", "answer": "a"}, [Q, A]),
    ("messages", {"messages": [SYSTEM, Q, A], "source": "smol-magpie-ultra"}, [SYSTEM, Q, A]),  # smoltalk
]


@pytest.mark.parametrize(("name", "values", "messages"), ROWS)
def test_a_row_as_its_data_set_has_it_is_found_and_read(
    name: str, values: Mapping[str, Any], messages: list[dict[str, str]]
) -> None:
    assert detect_conversation_format(values) == name
    parsed = parse_conversation(name, values, NAMES, "f:1")
    assert list(parsed.conversation.messages) == messages and parsed.repairs == ()
    assert parsed.conversation.category == values.get("category")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_example_is_known_as_itself_and_is_a_row(name: str) -> None:
    example = LAYOUTS[name].example
    assert fitting_formats(example, NAMES) == [name]
    conversation: Conversation = parse_conversation(name, example, NAMES, "").conversation
    assert conversation.messages[-1]["content"] == "5"


def test_columns_that_are_named_are_read_under_their_names_alone() -> None:
    values = {"instruction": "q", "context": "", "response": "a"}
    assert detect_conversation_format(values, ConversationColumns(prompt="instruction")) == "plaintext"
    values = {"conversations": [turn("human", "q"), turn("gpt", "a")]}
    assert detect_conversation_format(values, ConversationColumns(messages="conversations")) == "messages"


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("alpaca", {"instruction": "", "input": " ", "output": "a"}, "instruction: the prompt is empty"),
        ("query", {"query": "q", "response": ""}, "response: the answer is empty"),
        ("completion", {"prompt": "q", "completion": " "}, "completion: the answer is empty"),
        ("sharegpt", {"conversations": [turn("human", "q")]}, "no message is the assistant's"),
        ("sharegpt", {"conversations": [turn("human", "q"), turn("gpt", "a", weight=0)]}, "not to be learned"),
        ("question", {"question": 3, "answer": "a"}, "question: must be text"),
    ],
)
def test_layouts_refuse_with_the_reason(name: str, values: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_conversation(name, values, NAMES, "")


def test_an_unknown_layout_names_the_nearest_and_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"nearest format is alpaca, with .*; missing: output\.") as error:
        detect_conversation_format({"instruction": "q", "input": "i", "answr": "a"})
    assert "--dataset_format" not in str(error.value)
    with pytest.raises(UsageError, match=r"docs/data.md lists the formats.*--messages_key"):
        detect_conversation_format({"text": "q"})
    with pytest.raises(UsageError, match="--objective dpo"):
        detect_conversation_format({"prompt": "q", "chosen": "a", "rejected": "b"})
    assert set(LAYOUTS) < set(CONVERSATION_FORMATS)
