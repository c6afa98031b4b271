"""What other programs call the parts of a message, how they save lists as text, and what they write for nothing."""

from __future__ import annotations

from typing import Any

import pytest
from test_columns import USER, conversation_of, pair_of, reason_of
from test_formats import message

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def called(call: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message that makes this one."""
    turns = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        message("mild", "tool"),
        message("Mild."),
    ]
    return conversation_of({"messages": turns}).messages[1]["tool_calls"]


@pytest.mark.parametrize("key", ["arguments", "parameters", "input", "args"])
def test_arguments_of_calls_have_many_names(key: str) -> None:
    bare = {"name": "weather", key: {"city": "Oslo"}}
    assert called({"id": "c", "type": "tool_call", **bare}) == [{"id": "c", **CALL}]
    assert called({"id": "c", "index": 0, "function": {**bare, "unused": None}}) == [{"id": "c", **CALL}]


@pytest.mark.parametrize(
    "call",
    [
        {"name": "weather", "kwargs": {"city": "Oslo"}},
        {"function": {"name": "weather", "kwargs": {"city": "Oslo"}}},
        {"function": {"name": "weather"}, "arguments": {"city": "Oslo"}},
        {"name": "weather", "args": {"city": "Oslo"}, "input": {"city": "Rome"}},
    ],
)
def test_arguments_that_nobody_reads_are_refused(call: dict[str, Any]) -> None:
    assert "tool_calls[0]" in reason_of(lambda: called(call))


def test_a_part_of_text_holds_nothing_else() -> None:
    part = {"type": "text", "text": "q", "image": {"bytes": None, "path": None}}
    assert conversation_of({"messages": [message([part], "user"), message("a")]}).messages[0]["content"] == "q"
    turns = [message([{**part, "image": "x.png"}], "user"), message("a")]
    assert "'image'" in reason_of(lambda: conversation_of({"messages": turns}))


def test_what_arrow_writes_for_absent_keys_is_absent() -> None:
    nothing = {"from": None, "value": None, "function_call": {"name": None, "arguments": None}}
    turns = [{**USER, **nothing}, {**message("a"), **nothing}]
    assert list(conversation_of({"messages": turns}).messages) == [USER, message("a")]
    assert list(conversation_of({"messages": repr(turns)}).messages) == [USER, message("a")]
    other = [{"from": "human", "value": "q", "role": None, "content": None}, {"from": "gpt", "value": "a"}]
    assert list(conversation_of({"messages": other}).messages) == [USER, message("a")]
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert pair_of({**pair, "image": {"bytes": None, "path": None}}) == pair_of(pair)


def test_a_weight_of_nothing_matters_where_answers_are_learned() -> None:
    turns = [USER, {**message("a"), "weight": 0}, USER]
    answers = {"chosen": [message("b")], "rejected": [{**message("c"), "weight": 0}]}
    assert list(pair_of({"prompt": turns, **answers, "weight": 0}).messages) == [USER, message("a"), USER]
    learned = {"messages": [*turns, message("b")]}
    assert "messages[1].weight: answers that are not to be learned" in reason_of(lambda: conversation_of(learned))
