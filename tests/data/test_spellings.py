"""What other programs call the parts of a message, how they save lists as text, and what they write for nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from test_columns import USER, conversation_of, pair_of, reason_of
from test_formats import message

from qlora_dpo.data.conversations import ConversationColumns, detect_conversation_format, parse_conversation
from qlora_dpo.data.saved_text import is_written_messages, saved_messages, saved_parts

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


A, B = message("a"), message("b")


@pytest.mark.parametrize(
    "write",
    [
        lambda *turns: repr(turns),
        lambda *turns: json.dumps(json.dumps(turns)),
        lambda *turns: repr(json.dumps(turns)),
        lambda *turns: repr([{**turn, "name": float("nan")} for turn in turns]),
        lambda *turns: json.dumps([{**turn, "name": float("nan")} for turn in turns]),
    ],
)
def test_messages_saved_as_text_are_read_however_they_were_saved(write: Callable[..., str]) -> None:
    pair = {"prompt": write(USER), "chosen": write(A), "rejected": write(B)}
    assert pair_of(pair) == pair_of({"prompt": [USER], "chosen": [A], "rejected": [B]})
    for prompt in ("q", write(USER), [USER]):
        for answer in ("response", "completion"):
            assert list(conversation_of({"prompt": prompt, answer: write(A)}).messages) == [USER, A]


def test_parts_of_a_content_that_were_saved_as_text_are_joined() -> None:
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
    for text in (json.dumps(parts), repr(parts)):
        assert conversation_of({"messages": [message(text, "user"), A]}).messages[0]["content"] == "qr"
    images = json.dumps([*parts, {"type": "image_url", "image_url": "x.png"}])
    assert "only parts of text" in reason_of(lambda: conversation_of({"messages": [message(images, "user"), A]}))
    form = json.dumps([{"type": "text", "text": "Name", "required": True}])
    assert conversation_of({"messages": [USER, message(form)]}).messages[1]["content"] == form


def test_sft_refuses_messages_that_are_text_in_a_message() -> None:
    broken = json.dumps([USER, A])[:-2] + "]"
    for row in ({"prompt": [message(broken, "user")], "completion": "a"}, {"messages": [USER, message(repr((A,)))]}):
        assert "saved as text would be learned" in reason_of(lambda row=row: conversation_of(row))


def test_an_empty_list_beside_messages_is_no_answer() -> None:
    row = {"prompt": "q", "chosen": json.dumps([A]), "rejected": "[]"}
    assert "rejected: an empty list of messages" in reason_of(lambda: pair_of(row))
    assert pair_of({"prompt": [USER], "chosen": "[1]", "rejected": "[]"}).rejected == "[]"


@pytest.mark.parametrize("nothing", [None, "", []])
def test_no_prompt_beside_whole_dialogues_is_none(nothing: Any) -> None:
    whole = {"chosen": [USER, A], "rejected": [USER, B]}
    assert pair_of({"prompt": nothing, **whole}) == pair_of(whole)
    texts = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    assert pair_of({"prompt": nothing or None, **texts}) == pair_of(texts)
    assert pair_of({"prompt": "", **texts}) == pair_of(texts)
    assert list(conversation_of({"prompt": nothing, "completion": [USER, A]}).messages) == [USER, A]
    for row in (
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"messages": [USER], "chosen": [A], "rejected": [B]},
        {"conversations": [USER], "chosen": A, "rejected": B},
    ):
        assert pair_of({"prompt": nothing, **row}) == pair_of(row)


DIALOGUE = "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:"
TURNS = [USER, message("x"), message("r", "user")]


@pytest.mark.parametrize("start", ["", " ", "\n\nAssistant: "])
@pytest.mark.parametrize(
    ("question", "chosen", "rejected"),
    [
        ("prompt", "chosen", "rejected"),
        ("instruction", "chosen", "rejected"),
        ("question", "chosen", "rejected"),
        ("instruction", "chosen_response", "rejected_response"),
        ("query", "response", "rejected_response"),
    ],
)
def test_dialogues_in_prompts_of_pairs_become_turns(question: str, chosen: str, rejected: str, start: str) -> None:
    pair = pair_of({question: DIALOGUE, chosen: start + "a", rejected: start + "b"})
    assert (list(pair.messages), pair.chosen, pair.rejected) == (TURNS, "a", "b")


def test_a_dialogue_beside_messages_becomes_turns() -> None:
    assert list(pair_of({"prompt": DIALOGUE, "chosen": [A], "rejected": [B]}).messages) == TURNS
    assert list(pair_of({"prompt": DIALOGUE, "chosen": [*TURNS, A], "rejected": [*TURNS, B]}).messages) == TURNS


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("prompt", "response"),
        ("prompt", "completion"),
        ("instruction", "output"),
        ("instruction", "response"),
        ("query", "response"),
        ("question", "answer"),
    ],
)
def test_dialogues_in_prompts_of_sft_become_turns(question: str, answer: str) -> None:
    row = {question: DIALOGUE, answer: " a"}
    assert list(conversation_of(row).messages) == [*TURNS, A]
    names = ConversationColumns()
    parsed = parse_conversation(detect_conversation_format(row, names), row, names, "f:1")
    assert parsed.repairs == ("a dialogue in the text of the prompt, read as its turns",)


def test_texts_that_begin_with_much_space_take_no_time() -> None:
    for text in (" " * 200_000 + "x", '[{"role' + "\\" * 200_000 + "x", '"' + " " * 200_000):
        start = time.perf_counter()
        assert saved_messages("prompt", text) is None and not is_written_messages(text) and not saved_parts(text)
        assert time.perf_counter() - start < 1
