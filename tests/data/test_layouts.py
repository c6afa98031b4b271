"""How other data sets and tools lay out their rows, and what pairs are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_formats import NAMES, USER, message, refusal

from qlora_dpo.data.conversations import CONVERSATION_FORMATS
from qlora_dpo.data.formats import FORMATS, WRITTEN, check_format, detect_format, parse_row
from qlora_dpo.data.pair_formats.ranked import LEFT_OUT_ANSWERS
from qlora_dpo.data.pair_formats.votes import NO_COMMON_PROMPT
from qlora_dpo.data.preferences import NoPreferenceError, PreferencePair
from qlora_dpo.errors import UsageError

SYSTEM = message("s", "system")
ORCA = {"system": "s", "question": "q", "chosen": "x", "rejected": "y"}
ARGILLA = {"source": "evol", "instruction": "q", "chosen_response": "x", "rejected_response": "y"}
AXOLOTL = {"messages": [SYSTEM, USER], "chosen": message("x"), "rejected": message("y")}
OPENAI = {
    "input": {"messages": [SYSTEM, USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [message("x")],
    "non_preferred_output": [message("y")],
}
SWIFT = {"messages": [SYSTEM, USER, message("x")], "rejected_response": "y"}
SWIFT_QUERY = {"system": "s", "query": "q", "response": "x", "rejected_response": "y", "history": []}
ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "q",
    "models": ["a", "b", "c"],
    "correct_answers": ["None"],
    "completions": [
        {"model": "a", "response": "z", "overall_score": 5.0, "annotations": {}, "custom_system_prompt": "p"},
        {"model": "b", "response": "y", "overall_score": 2.5, "annotations": {}, "custom_system_prompt": "p"},
        {"model": "c", "response": "x", "overall_score": 8.0, "annotations": {}, "custom_system_prompt": "p"},
    ],
}
GENERATIONS = {"instruction": "q", "generations": ["y", "x"], "ratings": [1, 4.5]}
NECTAR = {
    "prompt": "\n\nHuman: q\n\nAssistant: ",
    "turns": 1,
    "num_responses": 3,
    "good_natured": True,
    "answers": [
        {"answer": "x", "model": "a", "rank": 1.0},
        {"answer": "z", "model": "b", "rank": 2.0},
        {"answer": "y", "model": "c", "rank": 3.0},
    ],
}
HELPSTEER2 = {"split": "train", "prompt": "q", "response_1": "y", "response_2": "x", "preference_strength": 1}
HELPSTEER3 = {
    "domain": "code",
    "language": "python",
    "context": [USER],
    "response1": "x",
    "response2": "y",
    "overall_preference": -3,
    "individual_preference": [{"score": -3, "reasoning": "r"}],
}
PKU = {
    "prompt": "q",
    "response_0": "y",
    "response_1": "x",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
ARENA = {
    "question_id": "1",
    "model_a": "a",
    "model_b": "b",
    "winner": "model_b",
    "judge": "arena_user_1",
    "turn": 1,
    "conversation_a": [USER, message("y")],
    "conversation_b": [USER, message("x")],
    "language": "English",
}
SHP = {
    "post_id": "1",
    "domain": "askculinary_train",
    "history": "q",
    "human_ref_A": "x",
    "human_ref_B": "y",
    "score_A": 8,
    "score_B": 2,
    "labels": 1,
}
KAGGLE = {
    "id": 1,
    "model_a": "m",
    "model_b": "n",
    "prompt": '["q"]',
    "response_a": '["x"]',
    "response_b": '["y"]',
    "winner_model_a": 1,
    "winner_model_b": 0,
    "winner_tie": 0,
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": "q"},
    "quotes_0": {"title": [], "extract": []},
    "answer_0": "y",
    "tokens_0": {},
    "score_0": -0.5,
    "answer_1": "x",
    "tokens_1": {},
    "score_1": 0.5,
}
SUMMARIZE = {
    "info": {"id": "1", "post": "p", "title": "t", "subreddit": "r", "site": None, "article": None},
    "summaries": [{"text": " y", "policy": "sup1", "note": None}, {"text": " x", "policy": "ref", "note": None}],
    "choice": 1,
    "worker": "w",
    "batch": "b",
    "split": "train",
    "extra": {"confidence": 7},
}

ROWS: dict[str, Mapping[str, Any]] = {
    "orca": ORCA,
    "argilla": ARGILLA,
    "axolotl": AXOLOTL,
    "openai": OPENAI,
    "swift": SWIFT,
    "swift-query": SWIFT_QUERY,
    "ultrafeedback": ULTRAFEEDBACK,
    "generations": GENERATIONS,
    "nectar": NECTAR,
    "helpsteer2": HELPSTEER2,
    "helpsteer3": HELPSTEER3,
    "pku-saferlhf": PKU,
    "arena": ARENA,
    "kaggle-arena": KAGGLE,
    "shp": SHP,
    "webgpt": WEBGPT,
    "summarize": SUMMARIZE,
}
WITH_SYSTEM = {"orca", "axolotl", "openai", "swift", "swift-query"}
VARIANTS = {"nectar-best-worst": "nectar", "pku-saferlhf-safer": "pku-saferlhf"}


def pairs_of(name: str, values: Mapping[str, Any]) -> list[PreferencePair]:
    parsed = parse_row(name, values, NAMES, "f:1")
    return [parsed.pair, *parsed.more]


def test_every_layout_has_a_row_here_and_in_the_documents() -> None:
    assert {*ROWS, *VARIANTS} == FORMATS.keys() - WRITTEN.keys()
    documents = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    assert [name for name in (*FORMATS, *CONVERSATION_FORMATS) if f"`{name}`" not in documents] == []


@pytest.mark.parametrize("name", ROWS)
def test_a_row_as_its_data_set_has_it_is_found_and_read(name: str) -> None:
    assert detect_format(ROWS[name]) == name
    pair = pairs_of(name, ROWS[name])[0]
    prompt = [SYSTEM, USER] if name in WITH_SYSTEM else [USER]
    if name == "summarize":
        prompt = [message("SUBREDDIT: r/r\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", "user")]
    assert (list(pair.messages), pair.chosen.strip()) == (prompt, "x")
    assert pair.rejected.strip() == ("z" if name == "nectar" else "y")


@pytest.mark.parametrize("name", [*ROWS, *VARIANTS])
def test_every_example_is_known_as_itself_and_is_a_row(name: str) -> None:
    form = FORMATS[name]
    found = [other for other, form in FORMATS.items() if form.matches(FORMATS[name].EXAMPLE, NAMES)]
    assert found == [VARIANTS.get(name, name)]
    pair = parse_row(name, form.EXAMPLE, NAMES, "").pair
    assert (pair.chosen, pair.rejected) == ("5", "6")


def test_a_pair_under_the_usual_names_is_read_as_such_whatever_stands_beside_it() -> None:
    usual = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for values in ROWS.values():
        beside = {column: value for column, value in values.items() if column not in usual}
        assert detect_format({**beside, **usual}) == "plaintext"
    whole = {"chosen": [USER, message("a")], "rejected": [USER, message("b")]}
    assert detect_format({**whole, "prompt": "q", "messages": whole["chosen"]}) == "messages"  # ultrafeedback_binarized
    assert detect_format({**whole, "messages": whole["chosen"]}) == "messages"


def test_a_read_only_format_says_so_where_it_is_to_be_written() -> None:
    with pytest.raises(UsageError, match="--to nectar: this format is only read; pairs are written as plaintext, "):
        check_format("nectar", "to")


def test_ranked_answers_are_pairs_of_the_best_and_each_that_is_worse() -> None:
    pairs = pairs_of("nectar", NECTAR)
    assert [(pair.chosen, pair.rejected, pair.origin) for pair in pairs] == [("x", "z", "f:1"), ("x", "y", "f:1#2")]
    assert [pair.rejected for pair in pairs_of("nectar-best-worst", NECTAR)] == ["y"]


def test_ranked_answers_that_say_nothing_are_not_compared() -> None:
    answers = [("b", 3), ("a", 1), ("c", 1), (" ", 4), ("a", 2)]
    row = {**NECTAR, "answers": [{"answer": text, "rank": rank} for text, rank in answers]}
    parsed = parse_row("nectar", row, NAMES, "")
    assert (parsed.pair.chosen, parsed.pair.rejected, parsed.more) == ("a", "b", ())
    assert parsed.repairs == (LEFT_OUT_ANSWERS,)


def test_ultrafeedback_without_overall_scores_takes_the_mean_of_its_aspects() -> None:
    def completion(text: str, *ratings: str) -> dict[str, Any]:
        annotations = {f"aspect {n}": {"Rating": rating, "Rationale": "r"} for n, rating in enumerate(ratings)}
        return {"response": text, "overall_score": None, "annotations": annotations}

    rows = [completion("a", "4", "3"), completion("b", "5", "N/A"), completion("c", "1", "5")]
    (pair,) = pairs_of("ultrafeedback", {**ULTRAFEEDBACK, "completions": rows})
    assert (pair.chosen, pair.rejected) == ("b", "c")


TIES: list[tuple[str, dict[str, Any]]] = [
    ("ultrafeedback", {**ULTRAFEEDBACK, "completions": [{"response": t, "overall_score": 7} for t in "ab"]}),
    ("generations", {**GENERATIONS, "ratings": [2, 2]}),
    ("nectar", {**NECTAR, "answers": [{"answer": t, "rank": 1} for t in "ab"]}),
    ("helpsteer2", {**HELPSTEER2, "preference_strength": 0}),
    ("helpsteer3", {**HELPSTEER3, "overall_preference": 0}),
    ("arena", {**ARENA, "winner": "tie"}),
    ("arena", {**ARENA, "winner": "tie (bothbad)"}),
    ("arena", {**ARENA, "winner": "both_bad"}),
    ("webgpt", {**WEBGPT, "score_0": 0.0, "score_1": 0.0}),
]


@pytest.mark.parametrize(("name", "values"), TIES)
def test_a_tie_prefers_neither(name: str, values: dict[str, Any]) -> None:
    with pytest.raises(NoPreferenceError):
        parse_row(name, values, NAMES, "")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pku-saferlhf", {"better_response_id": 0}),
        ("pku-saferlhf-safer", {}),
        ("helpsteer2", {"preference_strength": -1}),
        ("helpsteer3", {"overall_preference": 2}),
        ("arena", {"winner": "model_a"}),
        ("shp", {"labels": 0}),
        ("webgpt", {"score_0": 1.0}),
        ("summarize", {"choice": 0}),
    ],
)
def test_the_label_decides(name: str, change: dict[str, Any]) -> None:
    (pair,) = pairs_of(name, {**ROWS[VARIANTS.get(name, name)], **change})
    assert (pair.chosen.strip(), pair.rejected.strip()) == ("y", "x")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("pku-saferlhf", {"better_response_id": 2}, "better_response_id: must be 0 or 1 (it is 2)"),
        ("shp", {"labels": True}, "labels: must be a number (it is boolean)"),
        ("arena", {"winner": "both"}, "winner: must be model_a, model_b or a tie (it is 'both')"),
        (
            "arena",
            {"conversation_a": [USER]},
            "conversation_a: the last message must be the assistant's (it is by user)",
        ),
        ("summarize", {"summaries": [{"text": "a"}]}, "summaries: must be two objects with text"),
        ("webgpt", {"question": {}}, "full_text: missing"),
        ("nectar", {"answers": "x"}, "answers: must be a list of objects (it is text)"),
        ("nectar", {"answers": [{"answer": "x"}]}, "answers[0].rank: must be a number (it is null)"),
        ("nectar", {"prompt": " "}, "prompt: the prompt is empty"),
        (
            "ultrafeedback",
            {"completions": [{"response": "x"}]},
            "completions[0]: neither overall_score nor a rating in annotations",
        ),
        ("generations", {"ratings": [1]}, "ratings: must be a list as long as generations"),
        ("openai", {"input": "q"}, "input: must be an object with messages (it is text)"),
        (
            "openai",
            {"preferred_output": [USER, message("x")]},
            "preferred_output: must be one message, the answer (there are 2)",
        ),
        ("swift", {"messages": [message("x")]}, "messages: the message before the answers must be the user's"),
        ("helpsteer2", {"response_1": " "}, "rejected: the answer is empty"),
        ("orca", {"question": ""}, "question: the prompt is empty"),
    ],
)
def test_layouts_refuse_with_the_reason(name: str, change: dict[str, Any], reason: str) -> None:
    assert refusal(name, {**ROWS[name], **change}) == reason


def test_longer_dialogues_are_read_from_where_each_data_set_has_them() -> None:
    history = [USER, message("a"), message("r", "user")]
    rows: list[tuple[str, dict[str, Any]]] = [
        ("nectar", {"prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "}),
        ("helpsteer2", {"prompt": "q\n<extra_id_1>Assistant\na\n<extra_id_1>User\nr"}),
        ("helpsteer3", {"context": history}),
        ("arena", {"conversation_a": [*history, message("y")], "conversation_b": [*history, message("x")], "turn": 2}),
        ("swift", {"messages": [*history, message("x")], "rejected_response": [message("y")]}),
        ("swift-query", {"history": [["q", "a"]], "query": "r", "system": ""}),
    ]
    for name, change in rows:
        assert list(pairs_of(name, {**ROWS[name], **change})[0].messages) == history, name


def test_arena_dialogues_are_compared_at_the_turn_that_was_judged() -> None:
    both = {
        column: [USER, message(text), message("r", "user"), message("late")]
        for column, text in (("conversation_a", "y"), ("conversation_b", "x"))
    }
    (pair,) = pairs_of("arena", {**ARENA, **both})
    assert (list(pair.messages), pair.chosen, pair.rejected) == ([USER], "x", "y")
    with pytest.raises(NoPreferenceError, match=NO_COMMON_PROMPT):
        parse_row("arena", {**ARENA, **both, "turn": 2}, NAMES, "")


def test_an_article_without_a_post_is_summarized() -> None:
    (pair,) = pairs_of("summarize", {**SUMMARIZE, "info": {"article": "news", "post": None}})
    assert pair.prompt == "news\n\nTL;DR:"
