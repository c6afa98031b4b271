"""OpenDPO's and LLaMA-Factory's formats, and what every format writes and says it has no place for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import ALPACA, HISTORY, NAMES, OPENDPO, SHAREGPT, TURNS, USER, message, refusal, said

from qlora_dpo.data.formats import FORMATS, WRITTEN, all_columns, check_format, parse_row, write_row
from qlora_dpo.data.preferences import Message, NoPlaceError, PreferencePair, RowError
from qlora_dpo.errors import UsageError

SYSTEM = message("s", "system")


def test_opendpo_keeps_context_category_and_log_probs() -> None:
    pair = parse_row("opendpo", OPENDPO, NAMES, "f:1").pair
    assert (list(pair.prompt), pair.chosen, pair.rejected) == (OPENDPO["context"], "x", "y")
    assert (pair.category, pair.reference_logps, pair.origin) == ("A", (-115.16470484400884, -1.0), "f:1")


@pytest.mark.parametrize(
    ("meta", "category"),
    [
        ({"category_id": 3}, "3"),
        ({"category_id": 3, "category_name": ""}, "3"),
        ({"category_id": "x", "category_name": None}, "x"),
        ({"category_id": None, "category_name": "math"}, "math"),
        ({}, None),
        (None, None),
    ],
)
def test_opendpo_category_is_the_name_or_the_number(meta: Any, category: str | None) -> None:
    assert parse_row("opendpo", {**OPENDPO, "meta": meta}, NAMES, "").pair.category == category


def test_opendpo_log_probs_may_be_absent() -> None:
    values = {**OPENDPO, "reference_chosen_log_prob": None, "reference_rejected_log_prob": None}
    assert parse_row("opendpo", values, NAMES, "").pair.reference_logps is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": None}, "context: null"),
        ({"context": []}, "context: an empty list of messages"),
        ({"context": [message("a")]}, "context: the message before the answers must be the user's"),
        ({"chosen": USER}, "chosen.role: the answer must be the assistant's (it is by user)"),
        ({"rejected": "y"}, "rejected: a message must be an object with role and content (it is text)"),
        ({"rejected": message(" ")}, "rejected: the answer is empty"),
        ({"rejected": message("x")}, "rejected: the same answer as chosen"),
        ({"meta": "A"}, "meta: must be an object (it is text)"),
        ({"meta": {"category_name": 3}}, "meta.category_name: must be text (it is number)"),
        ({"meta": {"category_id": [1]}}, "meta.category_id: must be a number or text (it is list)"),
        (
            {"reference_chosen_log_prob": None},
            "reference_chosen_log_prob: missing, although the other answer's is there",
        ),
        ({"reference_rejected_log_prob": "-1"}, "reference_rejected_log_prob: must be a number (it is text)"),
        ({"reference_rejected_log_prob": 0.1}, "reference_rejected_log_prob: must be finite and at most 0 (it is 0.1)"),
        (
            {"reference_chosen_log_prob": float("-inf")},
            "reference_chosen_log_prob: must be finite and at most 0 (it is -inf)",
        ),
        (
            {"reference_chosen_log_prob": float("nan")},
            "reference_chosen_log_prob: must be finite and at most 0 (it is nan)",
        ),
        (
            {"reference_chosen_log_prob": -(10**5000)},
            "reference_chosen_log_prob: must be finite and at most 0 (it is a huge number)",
        ),
    ],
)
def test_opendpo_refuses_with_the_reason(change: dict[str, Any], reason: str) -> None:
    assert refusal("opendpo", {**OPENDPO, **change}) == reason


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        ({}, HISTORY),
        ({"system": "s", "tools": "[]", "images": []}, [SYSTEM, *HISTORY]),
        ({"conversations": [said("s", "system"), *TURNS]}, [SYSTEM, *HISTORY]),
        ({"conversations": [said("s", "system"), *TURNS], "system": "s"}, [SYSTEM, *HISTORY]),
        ({"conversations": HISTORY, "chosen": message("x"), "rejected": message("y"), "system": None}, HISTORY),
    ],
)
def test_sharegpt_reads_both_spellings_and_the_system_prompt(change: dict[str, Any], prompt: list[Any]) -> None:
    pair = parse_row("sharegpt", {**SHAREGPT, **change}, NAMES, "").pair
    assert (list(pair.messages), pair.chosen, pair.rejected) == (prompt, "x", "y")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": "q"}, "conversations[0]: a message must be an object with role and content (it is text)"),
        ({"conversations": TURNS[:2]}, "conversations: the message before the answers must be the user's"),
        ({"conversations": TURNS[1:]}, "conversations: user and assistant do not take turns (message 1)"),
        ({"conversations": [TURNS[0], *TURNS[2:]]}, "conversations: user and assistant do not take turns (message 2)"),
        (
            {"conversations": [TURNS[0], said("c", "function_call"), said("o", "observation")]},
            "conversations[1].value: must be a list of objects, or the JSON text of it",
        ),
        ({"conversations": [said("q", "bot")]},
         "conversations[0].from: must be one of system, human, gpt, user, assistant (it is 'bot')"),
        ({"conversations": [said(" ", "human")]}, "conversations[0].value: an empty message"),
        ({"chosen": said("x", "human")}, "chosen.from: the answer must be the assistant's (it is by user)"),
        ({"chosen": "x"}, "chosen: a message must be an object with role and content (it is text)"),
        ({"tools": "[3]"}, "tools[0]: must be an object, or the JSON text of it"),
        (
            {"images": ["a.png"]},
            "images: answers that need images are not supported (--ignore_columns images leaves it out)",
        ),
        ({"system": 3}, "system: must be text (it is number)"),
        (
            {"conversations": [said("s", "system"), *TURNS], "system": "t"},
            "system: another system prompt than that of the first turn (--ignore_columns system leaves it out)",
        ),
    ],
)  # fmt: skip
def test_sharegpt_refuses_with_the_reason(change: dict[str, Any], reason: str) -> None:
    assert refusal("sharegpt", {**SHAREGPT, **change}) == reason


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        ({}, [USER]),
        ({"input": "", "history": [], "system": ""}, [USER]),
        ({"input": None, "history": None, "system": None}, [USER]),
        ({"input": "i"}, [message("q\ni", "user")]),
        ({"instruction": "", "input": "i"}, [message("i", "user")]),
        ({"history": [["a", "b"]], "system": "s"}, [SYSTEM, *HISTORY]),
    ],
)
def test_alpaca_joins_instruction_input_history_and_system(change: dict[str, Any], prompt: list[Any]) -> None:
    pair = parse_row("alpaca", {**ALPACA, **change}, NAMES, "").pair
    assert (list(pair.messages), pair.chosen, pair.rejected) == (prompt, "x", "y")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"instruction": " ", "input": "\n"}, "instruction: the prompt is empty"),
        ({"instruction": None}, "instruction: null"),
        ({"input": 1}, "input: must be text (it is number)"),
        ({"history": "a"}, "history: must be a list of pairs of texts (it is text)"),
        ({"history": [["a"]]}, "history[0]: must be a pair of texts, what the user and the assistant said"),
        ({"history": [["a", "b"], ["a", 1]]}, "history[1]: must be text (it is number)"),
        ({"history": [["a", ""]]}, "history[0]: an empty message"),
        ({"tools": 3}, "tools: must be a list of objects, or the JSON text of it"),
        ({"chosen": ["x"]}, "chosen: must be text (it is list)"),
    ],
)
def test_alpaca_refuses_with_the_reason(change: dict[str, Any], reason: str) -> None:
    assert refusal("alpaca", {**ALPACA, **change}) == reason


@pytest.mark.parametrize("name", WRITTEN)
def test_every_example_is_known_as_itself_and_is_a_row(name: str) -> None:
    example = all_columns(name)
    assert [other for other, form in FORMATS.items() if form.matches(example, NAMES)] == [name]
    pair = parse_row(name, example, NAMES, "").pair
    assert pair.category == "math" and pair.confidence == 0.5
    # Nothing that a row of this format can hold lies outside the columns by which a Parquet file is laid out.
    assert set(write_row(name, pair)) <= set(example)


def test_a_format_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"--to 'opendop' is not known; choose plaintext, .* Did you mean opendpo\?"):
        check_format("opendop", "to")


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), st.sampled_from(["q", "a\nb"])
)
CONTENT = TEXT.filter(str.strip)


@st.composite
def pairs(draw: st.DrawFn) -> PreferencePair:
    """A pair of any shape: text or messages, with or without all that a pair may have."""
    roles = draw(st.sampled_from(["", "s", "ua", "sua", "uaua", "sa", "uu"]))
    names = {"s": "system", "u": "user", "a": "assistant"}
    history = [Message(role=names[letter], content=draw(CONTENT)) for letter in roles]
    last = draw(CONTENT)
    prompt = last if not history and draw(st.booleans()) else (*history, Message(role="user", content=last))
    chosen = draw(CONTENT)
    return PreferencePair(
        prompt,
        chosen,
        draw(CONTENT.filter(lambda text: text != chosen)),
        category=draw(st.none() | CONTENT),
        confidence=draw(st.just(1.0) | st.floats(0.001, 1)),
        reference_logps=draw(st.none() | st.tuples(st.floats(-1e4, 0), st.floats(-1e4, 0))),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pair=pairs())
def test_what_a_format_can_hold_comes_back_the_same_through_every_other(pair: PreferencePair) -> None:
    for name in WRITTEN:
        try:
            held = parse_row(name, write_row(name, pair), NAMES, "").pair
        except RowError:
            continue
        for other in WRITTEN:
            try:
                through = parse_row(other, write_row(other, held), NAMES, "").pair
            except RowError:
                continue
            assert parse_row(name, write_row(name, through), NAMES, "").pair == held


HOLDS = {
    "hh-rlhf": "q history",
    "plaintext": "q space",
    "messages": "q history system empty_system space turns",
    "opendpo": "q history system empty_system space turns logps",
    "sharegpt": "q history system empty_system space",
    "alpaca": "q history system space",
}
SHAPES: dict[str, PreferencePair] = {
    "q": PreferencePair("q", "x", "y", "c", 0.5),
    "history": PreferencePair(tuple(HISTORY), "x", "y"),
    "system": PreferencePair((SYSTEM, USER), "x", "y"),
    "empty_system": PreferencePair((message("", "system"), USER), "x", "y"),
    "space": PreferencePair(" q", "x ", "y"),
    "turns": PreferencePair((USER, USER), "x", "y"),
    "logps": PreferencePair("q", "x", "y", reference_logps=(-1.0, -2.5)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_format_holds_and_what_it_says_it_cannot(name: str, shape: str) -> None:
    if shape in HOLDS[name].split():
        write_row(name, SHAPES[shape])
        return
    with pytest.raises(RowError) as error:
        write_row(name, SHAPES[shape])
    assert isinstance(error.value, NoPlaceError) or shape == "turns"


@pytest.mark.parametrize("text", ["x\n\nHuman: y", "Assistant: x", "x\n\r\nAssistant: y"])
def test_hh_rlhf_writes_no_text_that_reads_as_a_turn(text: str) -> None:
    pair = PreferencePair("q", text, "y")
    if text.startswith("Assistant"):  # within a turn, not after an empty line
        assert parse_row("hh-rlhf", write_row("hh-rlhf", pair), NAMES, "").pair.chosen == text
        return
    with pytest.raises(RowError, match="holds a marker of the format"):
        write_row("hh-rlhf", pair)
