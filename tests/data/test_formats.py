"""Each rule of how a row becomes a pair."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_dpo.data.formats import ColumnNames, detect_format, parse_row
from qlora_dpo.data.pair_formats.hh_rlhf import JOINED_TURNS
from qlora_dpo.data.preferences import PreferencePair, RowError
from qlora_dpo.errors import UsageError

USER = {"role": "user", "content": "q"}
NAMES = ColumnNames()
ANOTHER = "; --confidence_key names another column, or '' for none"


def dialogue(*turns: str) -> str:
    """H:text and A:text to the markers of hh-rlhf."""
    speakers = {"H": "Human", "A": "Assistant"}
    return "".join(f"\n\n{speakers[turn[0]]}: {turn[2:]}" for turn in turns)


def hh(chosen: str, rejected: str, **more: Any) -> PreferencePair:
    return parse_row("hh-rlhf", {"chosen": chosen, "rejected": rejected, **more}, NAMES, "f:1").pair


def refusal(name: str, values: dict[str, Any]) -> str:
    with pytest.raises(RowError) as error:
        parse_row(name, values, NAMES, "f:1")
    return str(error.value)


def test_hh_rlhf_keeps_the_common_first_words_of_the_answers() -> None:
    pair = hh(dialogue("H:q", "A:I think yes"), dialogue("H:q", "A:I think no"))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), "I think yes", "I think no")
    assert pair.origin == "f:1"


def test_hh_rlhf_keeps_all_turns_of_the_history_stripped() -> None:
    history = ("H: a ", "A:b\n", "H:c\nd")
    pair = hh(dialogue(*history, "A:x"), dialogue(*history, "A:y"))
    assert [(m["role"], m["content"]) for m in pair.prompt if not isinstance(m, str)] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c\nd"),
    ]


def test_hh_rlhf_reads_windows_line_ends() -> None:
    text = dialogue("H:q", "A:x").replace("\n", "\r\n")
    assert hh(text, dialogue("H:q", "A:y")).chosen == "x"


def test_hh_rlhf_joins_turns_of_one_speaker_and_counts_it() -> None:
    values = {"chosen": dialogue("H:a", "H:b", "A:x", "A:y"), "rejected": dialogue("H:a", "H:b", "A:z")}
    parsed = parse_row("hh-rlhf", values, NAMES, "")
    assert parsed.pair.prompt == ({"role": "user", "content": "a\n\nb"},)
    assert (parsed.pair.chosen, parsed.repairs) == ("x\n\ny", (JOINED_TURNS,))


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (dialogue("H:q", "A:x", "H:r"), "chosen: the dialogue ends with Human, so there is no answer"),
        (dialogue("A:x", "H:q", "A:y"), "chosen: the dialogue does not start with Human"),
        ("Once" + dialogue("H:q", "A:x"), "chosen: text before the first marker (4 characters)"),
        ("no markers", "chosen: text before the first marker (10 characters)"),
        ("  ", "chosen: holds no dialogue"),
        (dialogue("H:q", "A: \n"), "chosen: the answer is empty"),
        (dialogue("H:", "A:x"), "chosen: a turn of the history is empty (turn 1)"),
        (dialogue("H:q", "A:", "H:r", "A:x"), "chosen: a turn of the history is empty (turn 2)"),
        (dialogue("H:other", "A:x"), "rejected: its history differs from that of chosen (turn 1)"),
        (dialogue("H:q", "A:x", "H:r", "A:x"), "rejected: its history differs from that of chosen (turn 2)"),
        (dialogue("H:q", "A:y"), "rejected: the same answer as chosen"),
        (None, "chosen: null"),
        (7, "chosen: must be text (it is number)"),
        (["x"], "chosen: must be text (it is list)"),
        (
            "\n\nHuman: \ud800\n\nAssistant: x",
            "chosen: holds half of a surrogate pair, which is no character",
        ),
    ],
)
def test_hh_rlhf_refuses_with_the_reason(chosen: Any, reason: str) -> None:
    assert refusal("hh-rlhf", {"chosen": chosen, "rejected": dialogue("H:q", "A:y")}) == reason


def test_missing_column_is_named() -> None:
    assert refusal("hh-rlhf", {"rejected": "x"}) == "chosen: missing"
    assert refusal("messages", {"chosen": "x", "prompt": "q"}) == "rejected: missing"


def test_plaintext_is_taken_exactly_and_from_the_named_columns() -> None:
    names = ColumnNames("question", "good", "bad")
    pair = parse_row("plaintext", {"question": " q\n", "good": " a ", "bad": "b\n"}, names, "").pair
    assert (pair.prompt, pair.chosen, pair.rejected) == (" q\n", " a ", "b\n")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "\n"}, "prompt: the prompt is empty"),
        ({"prompt": float("nan")}, "prompt: must be text (it is NaN)"),
        ({"chosen": " \n"}, "chosen: the answer is empty"),
        ({"rejected": "a"}, "rejected: the same answer as chosen"),
        ({"category": 3}, "category: must be text (it is number; --category_key names another column, or '' for none)"),
        ({"confidence": "high"}, f"confidence: must be a number (it is text{ANOTHER})"),
        ({"confidence": True}, f"confidence: must be a number (it is boolean{ANOTHER})"),
        ({"confidence": 0}, f"confidence: must be above 0 and at most 1 (it is 0{ANOTHER})"),
        ({"confidence": 1.5}, f"confidence: must be above 0 and at most 1 (it is 1.5{ANOTHER})"),
        ({"confidence": float("nan")}, f"confidence: must be above 0 and at most 1 (it is nan{ANOTHER})"),
        ({"confidence": 10**5000}, f"confidence: must be above 0 and at most 1 (it is a huge number{ANOTHER})"),
    ],
)
def test_plaintext_refuses_with_the_reason(change: dict[str, Any], reason: str) -> None:
    assert refusal("plaintext", {"prompt": "q", "chosen": "a", "rejected": "b", **change}) == reason


def test_category_and_confidence_are_kept() -> None:
    values = {"prompt": "q", "chosen": "a", "rejected": "b"}
    pair = parse_row("plaintext", {**values, "category": "math", "confidence": 0.75}, NAMES, "").pair
    assert (pair.category, pair.confidence) == ("math", 0.75)
    pair = parse_row("plaintext", {**values, "category": None, "confidence": None}, NAMES, "").pair
    assert (pair.category, pair.confidence) == (None, 1.0)


def message(content: Any, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("prompt", ["q", USER, [USER]])
@pytest.mark.parametrize("answer", [lambda t: t, message, lambda t: [message(t)], lambda t: [USER, message(t)]])
def test_messages_takes_every_shape_of_prompt_and_answer(prompt: Any, answer: Any) -> None:
    values = {"prompt": prompt, "chosen": answer(" a "), "rejected": answer("b")}
    pair = parse_row("messages", values, NAMES, "").pair
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), " a ", "b")


def test_messages_without_prompt_takes_the_common_messages() -> None:
    history = [message("", "system"), USER, message("a"), message("r", "user")]
    pair = parse_row("messages", {"chosen": [*history, message("x")], "rejected": [*history, message("y")]}, NAMES, "")
    assert (list(pair.pair.prompt), pair.pair.chosen, pair.pair.rejected) == (history, "x", "y")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"chosen": [USER]}, "chosen: the last message must be the assistant's (it is by user)"),
        ({"chosen": []}, "chosen: an empty list of messages"),
        ({"chosen": [message([3])]}, "chosen[0].content[0]: must be text (it is number)"),
        ({"chosen": [message(None)]}, "chosen[0].content: null"),
        ({"chosen": [message("")]}, "chosen: the answer is empty"),
        ({"chosen": ["text"]}, "chosen[0]: a message must be an object with role and content (it is text)"),
        ({"chosen": [{"k": "x"}]}, "chosen[0].role: must be one of system, user, assistant, tool (it is None)"),
        ({"chosen": [{"role": "assistant"}]}, "chosen[0].content: missing"),
        ({"chosen": [{**message("x"), "k": 1}]}, "chosen[0]: a message has keys besides role and content ('k')"),
        ({"prompt": [message("a")]}, "prompt: the message before the answers must be the user's"),
        ({"prompt": [message(" ", "user")]}, "prompt[0].content: an empty message"),
        ({"prompt": None}, "prompt: null"),
        (
            {"chosen": [message("z", "user"), message("x")]},
            "chosen: the messages before its answer are not those of prompt (--ignore_columns prompt leaves it out)",
        ),
        ({"rejected": [message("x")]}, "rejected: the same answer as chosen"),
    ],
)  # fmt: skip
def test_messages_refuses_with_the_reason(values: dict[str, Any], reason: str) -> None:
    row = {"prompt": [USER], "chosen": [message("x")], "rejected": [message("y")], **values}
    assert refusal("messages", row) == reason


def test_messages_without_prompt_refuses_unequal_histories() -> None:
    row = {"chosen": [USER, message("x")], "rejected": [message("z", "user"), message("y")]}
    assert refusal("messages", row) == "rejected: the messages before its answer are not those of chosen"
    row = {"chosen": [message("x")], "rejected": [message("y")]}
    assert refusal("messages", row) == "prompt: the message before the answers must be the user's"


def said(text: Any, speaker: str = "gpt") -> dict[str, Any]:
    return {"from": speaker, "value": text}


OPENDPO = {
    "context": [message("s", "system"), USER],
    "chosen": message("x"),
    "rejected": message("y"),
    "reference_chosen_log_prob": -115.16470484400884,
    "reference_rejected_log_prob": -1,
    "meta": {"category_id": 1, "category_name": "A"},
}
TURNS = [said("a", "human"), said("b"), said("q", "human")]
SHAREGPT = {"conversations": TURNS, "chosen": said("x"), "rejected": said("y")}
HISTORY = [message("a", "user"), message("b"), USER]
ALPACA = {"instruction": "q", "chosen": "x", "rejected": "y"}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"chosen": dialogue("H:q", "A:x"), "rejected": dialogue("H:q", "A:y"), "id": 3}, "hh-rlhf"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "plaintext"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "messages"),
        ({"prompt": "q", "chosen": [USER, message("a")], "rejected": [USER, message("b")]}, "messages"),
        ({"chosen": [USER, message("a")], "rejected": [USER, message("b")]}, "messages"),
        ({"prompt": [USER], "chosen": message("a"), "rejected": message("b"), "context": "c"}, "messages"),
        ({"chosen": [USER, message("a")], "rejected": [USER, message("b")], "context": "c"}, "messages"),
        ({"chosen": [USER, message("a")], "rejected": [USER, message("b")], "instruction": "q"}, "messages"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "instruction": "q", "context": [USER]}, "plaintext"),
        (OPENDPO, "opendpo"),
        ({**OPENDPO, "context": USER}, "opendpo"),
        (SHAREGPT, "sharegpt"),
        ({**SHAREGPT, "conversations": HISTORY, "chosen": message("x"), "rejected": message("y")}, "sharegpt"),
        (ALPACA, "alpaca"),
        ({**ALPACA, "input": "i", "history": [], "system": None}, "alpaca"),
    ],
)
def test_the_format_is_known_by_the_columns(values: dict[str, Any], name: str) -> None:
    assert detect_format(values) == name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, r"columns are none\. No format has one of these; docs/data.md lists .* --prompt_key and --chosen_key"),
        ({"text": "a"}, "No format has one of these"),
        (
            {"prompt": "q", "chosen": "a", "rejectd": "b"},
            r"nearest format is plaintext, .*missing: rejected\. .*--rejected_",
        ),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, r"nearest format is plaintext, .*is of another kind\.$"),
        (
            {"prompt": "q", "response_0": "a", "response_1": "b", "safer_response_id": 1},
            r"nearest format is pku-saferlhf, .*missing: better_response_id\.$",
        ),
        ({"conversation_a": [], "conversation_b": []}, r"nearest format is arena, .*missing: winner\.$"),
    ],
)
def test_an_unclear_format_names_the_nearest_and_what_is_missing(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        detect_format(values)
    assert "--dataset_format" not in str(error.value) and all(column in str(error.value) for column in values)


def test_columns_that_fit_two_formats_are_for_the_user_to_tell() -> None:
    values = {"context": [USER], "conversations": TURNS, "chosen": message("a"), "rejected": message("b")}
    with pytest.raises(UsageError, match="fit opendpo and sharegpt: name one of these with --dataset_format"):
        detect_format(values)
