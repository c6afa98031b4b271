"""What a message may hold, how dialogues and messages are found in text, and prompts that answers repeat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_columns import NAMES, PLAIN, TALK, TOOL, USER, conversation_of, pair_of, reason_of
from test_formats import dialogue, message, said

from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.formats import FORMATS, parse_row, write_row
from qlora_dpo.data.pair_formats.hh_rlhf import DIALOGUE, open_dialogue
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import UNREAD, NoPlaceError, PreferencePair, RowError
from qlora_dpo.data.saved_text import NO_MESSAGES, saved_messages

ARGUMENTS = {"city": "Oslo"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALLED: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "mild", "tool_call_id": "c1"}


def answer(**more: Any) -> PreferencePair:
    """The pair whose better answer is a message with these keys."""
    return pair_of({"prompt": [USER], "chosen": [{**message("x"), **more}], "rejected": [message("y")]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_has_one_name(key: str) -> None:
    pair = answer(**{key: "hm"})
    assert pair.chosen_message == {**message("x"), "reasoning_content": "hm"} and not pair.rejected_fields
    turns = [USER, {**message("a"), key: "hm"}]
    assert conversation_of({"messages": turns}).messages[1] == {**message("a"), "reasoning_content": "hm"}


@pytest.mark.parametrize("empty", [None, "", [], {}, "[]"])
def test_empty_keys_of_messages_are_absent(empty: Any) -> None:
    pair = answer(tool_calls=empty, annotations=empty, refusal=empty, reasoning=empty, audio=empty)
    assert pair.chosen_message == message("x")


@pytest.mark.parametrize(
    "calls",
    [
        [CALL],
        json.dumps([CALL]),
        [{**CALL, "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}],
        [json.dumps(CALL)],
    ],
)
def test_calls_of_tools_are_read_with_arguments_as_an_object(calls: Any) -> None:
    for content in ({"content": ""}, {"content": None}, {}):
        turns = [USER, {"role": "assistant", **content, "tool_calls": calls}, RESULT, message("Mild.")]
        assert list(conversation_of({"messages": turns, "tools": [TOOL]}).messages)[1:3] == [CALLED, RESULT]
    pair = pair_of(
        {"prompt": [USER], "chosen": [{"role": "assistant", "tool_calls": calls}], "rejected": [message("y")]}
    )
    assert pair.chosen_message == CALLED


def test_older_and_other_spellings_of_calls_are_the_same() -> None:
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    called = {"role": "assistant", "content": "", "tool_calls": [{k: v for k, v in CALL.items() if k != "id"}]}
    old = [USER, {"role": "assistant", "content": None, "function_call": function},
           {"role": "function", "name": "weather", "content": "mild"}, message("Mild.")]  # fmt: skip
    result = {"role": "tool", "content": "mild", "name": "weather"}
    assert list(conversation_of({"messages": old}).messages) == [USER, called, result, message("Mild.")]
    shared = [said("q", "human"), said(json.dumps(function), "function_call"), said("mild", "observation"), said("M")]
    assert list(conversation_of({"messages": shared}).messages)[1:3] == [called, message("mild", "tool")]
    row = {"conversations": shared[:3], "chosen": said("x"), "rejected": said("y"), "tools": json.dumps([TOOL])}
    assert list(pair_of(row).messages) == [USER, called, message("mild", "tool")] and pair_of(row).tools == (TOOL,)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tool_calls": "x"}, "chosen[0].tool_calls: must be a list of objects, or the JSON text of it"),
        ({"tool_calls": [{"function": {}}]}, "chosen[0].tool_calls[0].function.name: must be text (it is null)"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
         "chosen[0].tool_calls[0].function.arguments: must be an object, or the JSON text of it"),
        ({"refusal": "no"}, "chosen[0]: a message has keys besides role and content ('refusal')"),
        ({"mood": 0}, "chosen[0]: a message has keys besides role and content ('mood')"),
        ({"reasoning": "a", "thinking": "b"},
         "chosen[0].thinking: says something else than another key of the message (reasoning_content)"),
        ({"content": [{"type": "image_url", "image_url": {}}]},
         "chosen[0].content[0]: only parts of text are supported (it is 'image_url')"),
    ],
)  # fmt: skip
def test_what_a_message_has_no_place_for_is_refused(more: dict[str, Any], reason: str) -> None:
    assert reason_of(lambda: answer(**more)) == reason


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "a fish."}]
    values = {"prompt": [message(parts, "user")], "chosen": [message(parts[:1])], "rejected": [message([])]}
    assert reason_of(lambda: pair_of(values)) == "rejected: the answer is empty"
    pair = pair_of({**values, "rejected": [message([{"text": "Oak."}])]})
    assert (list(pair.messages), pair.chosen, pair.rejected) == ([message("Name a fish.", "user")], "Name ", "Oak.")


def test_from_and_value_are_read_wherever_messages_are() -> None:
    talk = [said("q", "human"), said("x")]
    assert pair_of({"chosen": talk, "rejected": [said("q", "human"), said("y")]}).messages == (USER,)
    assert pair_of({"prompt": talk[:1], "chosen": [said("x")], "rejected": "y"}).messages == (USER,)
    assert pair_of({"context": talk[:1], "chosen": said("x"), "rejected": said("y")}).messages == (USER,)


def test_a_row_of_saved_messages_among_rows_of_text_is_read() -> None:
    values = {**PLAIN, "chosen": repr([USER, message("x")])}
    assert parse_row("plaintext", values, NAMES, "").pair.chosen == "x"


LONG = [message("s", "system"), *TALK, USER]


@pytest.mark.parametrize("prompt", ["q", " q\n", "x", [USER], LONG, LONG[1:], [TALK[0]], None])
def test_dialogues_that_hold_their_prompt_say_the_prompt(prompt: Any) -> None:
    values = {"prompt": prompt, "chosen": [*LONG, message("a")], "rejected": [*LONG, message("b")]}
    if prompt is None:
        del values["prompt"]
    pair = pair_of(values)
    assert (list(pair.messages), pair.chosen, pair.rejected) == (LONG, "a", "b")


def test_a_prompt_with_a_system_prompt_beside_dialogues_without_keeps_it() -> None:
    values = {"prompt": LONG, "chosen": [*LONG[1:], message("a")], "rejected": "b"}
    assert list(pair_of(values).messages) == LONG


def test_answers_of_several_messages_share_all_but_the_last() -> None:
    values: dict[str, Any] = {"prompt": "q", "chosen": [CALLED, RESULT, message("a")]}
    assert list(pair_of({**values, "rejected": [CALLED, RESULT, message("b")]}).messages) == [USER, CALLED, RESULT]
    other = [CALLED, {**RESULT, "content": "cold"}, message("b")]
    reason = "rejected: the answers are of several messages, and differ before the last of them (message 3)"
    assert reason_of(lambda: pair_of({**values, "rejected": other})) == reason
    assert "differ before the last of them (message 2)" in reason_of(lambda: pair_of({**values, "rejected": "b"}))


NUMPY = "[{'content': 'q', 'role': 'user'}\n {'content': 'it\\'s\\n \"x\"', 'role': 'assistant'}]"
SAID = [USER, message('it\'s\n "x"')]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(SAID),
        json.dumps(SAID, indent=1),
        repr(SAID),
        NUMPY,
        f"array({NUMPY}, dtype=object)",
        repr([said("q", "human"), said('it\'s\n "x"')]),
    ],
)
def test_messages_that_were_saved_as_text_are_messages(text: str) -> None:
    other = repr([USER, message("y")])
    for prompt in ({}, {"prompt": "q"}, {"prompt": repr([USER])}):
        pair = pair_of({**prompt, "chosen": text, "rejected": other})
        assert (list(pair.messages), pair.chosen, pair.rejected) == ([USER], SAID[1]["content"], "y")
    assert list(conversation_of({"messages": text}).messages) == SAID
    assert list(conversation_of({"conversations": text}, messages="conversations").messages) == SAID
    assert (
        pair_of({"context": repr([USER]), "chosen": repr(message("x")), "rejected": repr(message("y"))}).chosen == "x"
    )


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "[1] see there",
        '{"role": "admin"}',
        '[{"name": "x", "value": 3}]',
        "[{'role': 'x'}] is one",
        "{x}",
    ],
)
def test_other_text_that_looks_like_a_list_stays_text(text: str) -> None:
    assert saved_messages("chosen", text) is None
    assert pair_of({**PLAIN, "chosen": text}).chosen == text


@pytest.mark.parametrize(
    "text", ["[{'role': 'user', 'content': 'q'}, ...", "[{'role': 'user', 'content': array('q')}]"]
)
def test_messages_as_text_that_cannot_be_read_are_refused(text: str) -> None:
    assert reason_of(lambda: pair_of({**PLAIN, "chosen": text})) == f"chosen: {NO_MESSAGES}"


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (dialogue("H:q"), [USER]),
        (dialogue("H:q", "A:"), [USER]),
        ("Human: q\n\nAssistant: ", [USER]),
        (dialogue("H:x", "A:y", "H:q") + "\n\nAssistant:", [*TALK, USER]),
        (dialogue("H:x", "A:y", "H:q").replace("\n", "\r\n"), [*TALK, USER]),
        ("Human: q", None),
        (dialogue("H:q", "A:x"), None),
        (dialogue("H:", "A:"), None),
        ("Who said this?" + dialogue("H:q", "A:"), None),
    ],
)
def test_a_dialogue_in_the_prompt_becomes_its_turns(text: str, turns: list[Any] | None) -> None:
    assert open_dialogue(text) == (None if turns is None else tuple(turns))
    parsed = parse_row("plaintext", {"prompt": text, "chosen": " a", "rejected": " b"}, NAMES, "")
    conversation = conversation_of({"prompt": text, "response": " a"})
    if turns is None:
        assert (parsed.pair.prompt, parsed.pair.chosen, parsed.repairs) == (text, " a", ())
        assert conversation.messages == (message(text, "user"), message(" a"))
    else:
        assert (list(parsed.pair.messages), parsed.pair.chosen, parsed.repairs) == (turns, "a", (DIALOGUE,))
        assert list(conversation.messages) == [*turns, message("a")]


@pytest.mark.parametrize("prompt", ["q", dialogue("H:x", "A:y", "H:q", "A:")])
def test_a_prompt_beside_whole_dialogues_is_a_part_of_them(prompt: str) -> None:
    before = ("H:x", "A:y", "H:q")
    values = {"prompt": prompt, "chosen": dialogue(*before, "A:a"), "rejected": dialogue(*before, "A:b")}
    assert list(pair_of(values).messages) == [*TALK, USER]
    assert "holds dialogues of which prompt is no part" in reason_of(lambda: pair_of({**values, "prompt": "other"}))


RICH = PreferencePair(
    (USER, CALLED, RESULT), "a", "b", chosen_fields={"reasoning_content": "hm"}, tools=(TOOL,),
    chat_template_kwargs={"enable_thinking": False},
)  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("name", ["messages", "opendpo"])
def test_calls_thoughts_and_tools_are_written_where_there_are_messages(name: str) -> None:
    assert parse_row(name, json.loads(json.dumps(write_row(name, RICH))), NAMES, "").pair == RICH


@pytest.mark.parametrize("name", ["hh-rlhf", "plaintext", "sharegpt", "alpaca"])
def test_formats_of_texts_say_that_they_have_no_place(name: str) -> None:
    with pytest.raises(RowError, match="no place for calls of tools"):
        write_row(name, RICH)
    thought = PreferencePair("q", "a", "b", rejected_fields={"reasoning_content": "hm"})
    with pytest.raises(NoPlaceError, match=r"no place for a thought \(--drop thoughts\)"):
        write_row(name, thought)
    carried = PreferencePair("q", "a", "b", tools=(TOOL,), chat_template_kwargs={"x": 1})
    assert parse_row(name, write_row(name, carried), NAMES, "").pair.tools == (TOOL,)
    assert name in FORMATS


def _parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def _saved(path: Path, rows: list[dict[str, Any]]) -> str:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("write", [_parquet, _saved])
def test_only_columns_that_somebody_reads_are_taken_out_of_their_file(
    tmp_path: Path, write: Callable[..., str]
) -> None:
    rows = [{**PLAIN, "picture": {"bytes": b"x" * 10}, "tools": [{"a": {"b": None}}, {"a": {"b": 1}}], "images": None}]
    source = open_source(write(tmp_path / "pairs.parquet", rows))
    (row,) = source.rows({*PLAIN, "tools"})
    assert row.values == {**PLAIN, "tools": [{"a": {}}, {"a": {"b": 1}}], "picture": UNREAD, "images": UNREAD}
    reader = PairReader(source, "auto", NAMES)
    assert [pair.tools for pair in reader if isinstance(pair, PreferencePair)] == [({"a": {}}, {"a": {"b": 1}})]
    assert reader.unread.names == ("picture",)
