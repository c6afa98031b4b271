"""Rows with two answers and a vote: which is better is said by a number, a score each, or the name of the winner."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from qlora_dpo.data.messages import check_prompt, messages_of
from qlora_dpo.data.pair_formats.layout import Layout, Prompt, dialogue_of, message_pair, number_of, text_prompt
from qlora_dpo.data.preferences import Message, NoPreferenceError, ParsedPair, PreferencePair, RowError
from qlora_dpo.data.saved_text import parsed_text
from qlora_dpo.data.values import Values, clean_text, is_empty, kind, shown, text_of, truth_of, value_of

TIE = "a tie"
NO_COMMON_PROMPT = "earlier answers that differ from those of conversation_a, so the last ones have no common prompt"

_HELPSTEER_TURN = re.compile(r"<extra_id_1>(User|Assistant)\n")

Vote = Callable[[Values], int | None]
"""Which of two answers, 0 or 1, is better; None for a tie."""


def _reader(
    label: str, vote: Vote, prompt: Callable[[Values], Prompt], answers: Callable[[Values], tuple[str, str]]
) -> Callable[[Values], ParsedPair]:
    """Reads rows whose `label` is the column that says which answer is better."""

    def read(values: Values) -> ParsedPair:
        better = vote(values)
        if better is None:
            raise NoPreferenceError(label, TIE)
        both = answers(values)
        return ParsedPair(PreferencePair(prompt(values), both[better], both[1 - better]))

    return read


def _texts(first: str, second: str) -> Callable[[Values], tuple[str, str]]:
    return lambda values: (text_of(values, first), text_of(values, second))


def _prompt(column: str) -> Callable[[Values], Prompt]:
    return lambda values: text_prompt(values, column)


def _by_sign(column: str) -> Vote:
    """Below 0 the first is better, above 0 the second, as HelpSteer counts."""

    def vote(values: Values) -> int | None:
        number = number_of(values, column)
        return None if number == 0 else int(number > 0)

    return vote


def _by_number(column: str, *, first: int) -> Vote:
    """`first` stands for the first answer, the other one of 0 and 1 for the second."""

    def vote(values: Values) -> int:
        number = number_of(values, column)
        if number not in (0, 1):
            raise RowError(column, f"must be 0 or 1 (it is {shown(number)})")
        return int(number != first)

    return vote


def _by_scores(values: Values) -> int | None:
    scores = number_of(values, "score_0"), number_of(values, "score_1")
    return None if scores[0] == scores[1] else int(scores[1] > scores[0])


def _by_winner(values: Values) -> int | None:
    winner = text_of(values, "winner")
    if winner in ("model_a", "model_b"):
        return int(winner == "model_b")
    if winner.startswith("tie") or winner in ("both_bad", "bothbad"):
        return None
    raise RowError("winner", f"must be model_a, model_b or a tie (it is {shown(winner)})")


def _helpsteer2_prompt(values: Values) -> Prompt:
    """HelpSteer2 writes the turns of longer dialogues into the prompt."""
    text = text_of(values, "prompt")
    first, *turns = _HELPSTEER_TURN.split(text)
    if not turns:
        return text_prompt(values, "prompt")
    messages: list[Message] = [{"role": "user", "content": first.strip("\n")}]
    for speaker, said in zip(turns[0::2], turns[1::2], strict=True):
        messages.append({"role": speaker.lower(), "content": said.strip("\n")})
    check_prompt("prompt", messages)
    return tuple(messages)


def _helpsteer3_prompt(values: Values) -> Prompt:
    messages = messages_of("context", value_of(values, "context"))
    check_prompt("context", messages)
    return tuple(messages)


def _webgpt_prompt(values: Values) -> Prompt:
    question = value_of(values, "question")
    return text_prompt(question if isinstance(question, dict) else values, "full_text")


def _summary_prompt(values: Values) -> Prompt:
    """The post as the models that were compared got it (arXiv 2009.01325, table 4), or the article."""
    info = value_of(values, "info")
    if not isinstance(info, dict):
        raise RowError("info", f"must be an object (it is {kind(info)})")
    if info.get("post") is None:
        return f"{clean_text('info.article', info.get('article'))}\n\nTL;DR:"
    labels = (("SUBREDDIT: r/", "subreddit"), ("TITLE: ", "title"), ("POST: ", "post"))
    parts = [label + clean_text(f"info.{name}", info[name]) for label, name in labels if info.get(name)]
    return "\n\n".join([*parts, "TL;DR:"])


def _summaries(values: Values) -> tuple[str, str]:
    summaries = value_of(values, "summaries")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(one, dict) for one in summaries):
        raise RowError("summaries", "must be two objects with text")
    first, second = (clean_text(f"summaries[{n}].text", one.get("text")) for n, one in enumerate(summaries))
    return first, second


def _read_arena(values: Values) -> ParsedPair:
    better = _by_winner(values)
    if better is None:
        raise NoPreferenceError("winner", TIE)
    both = [_judged_turns(values, column) for column in ("conversation_a", "conversation_b")]
    prompt = both[0][:-1]
    check_prompt("conversation_a", prompt)
    if both[1][:-1] != prompt:
        raise NoPreferenceError("conversation_b", NO_COMMON_PROMPT)
    return ParsedPair(message_pair(prompt, both[better][-1], both[1 - better][-1]))


def _judged_turns(values: Values, column: str) -> list[Message]:
    """The messages up to the answer that was judged: the last, or that of the turn which the row names (MT-bench)."""
    messages = dialogue_of(column, value_of(values, column))
    turn = values.get("turn")
    if is_empty(turn):
        return messages
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    named = {str(number): place for number, place in enumerate(answers, 1)}
    place = named.get(str(turn).strip().removesuffix(".0"))
    if place is None:
        raise RowError("turn", f"must be a number from 1 to {len(answers)} (it is {shown(turn)})")
    return messages[: place + 1]


def _read_kaggle(values: Values) -> ParsedPair:
    """Arena votes as Kaggle's competitions have them: a text, or the JSON list of the texts of all turns, each."""
    winners = [column for column in _KAGGLE_WINNERS if truth_of(value_of(values, column))]
    if winners != [_KAGGLE_WINNERS[0]] and winners != [_KAGGLE_WINNERS[1]]:
        if len(winners) > 1:
            raise RowError(winners[1], f"there is more than one winner ({', '.join(winners)})")
        raise NoPreferenceError("winner_tie", TIE)
    better = _KAGGLE_WINNERS.index(winners[0])
    asked, *both = (_texts_of_turns(column, value_of(values, column)) for column in _KAGGLE_TEXTS)
    if any(len(texts) != len(asked) for texts in both):
        raise RowError("prompt", "must have as many turns as response_a and response_b")
    if both[0][:-1] != both[1][:-1]:
        raise NoPreferenceError("response_b", NO_COMMON_PROMPT)
    prompt: list[Message] = []
    for question, answer in zip(asked, both[0], strict=True):
        prompt += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    empty = next((message for message in prompt[:-1] if not message["content"].strip()), None)
    if empty is not None:
        raise RowError("prompt", f"an empty message of the {empty['role']}")
    return ParsedPair(PreferencePair(tuple(prompt[:-1]), both[better][-1], both[1 - better][-1]))


def _texts_of_turns(column: str, value: object) -> list[str]:
    given = parsed_text(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    turns = given if isinstance(given, list) else [value]
    # an answer that was not given is null there
    return [clean_text(f"{column}[{number}]", "" if turn is None else turn) for number, turn in enumerate(turns)]


_KAGGLE_TEXTS = ("prompt", "response_a", "response_b")
_KAGGLE_WINNERS = ("winner_model_a", "winner_model_b", "winner_tie")
_ASKED: dict[str, Any] = {"prompt": "What is 2 + 3?"}
_CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": answer}] for answer in ("5", "6")
]


def _pku(label: str, *, is_variant: bool) -> Layout:
    return Layout(
        "prompt, response_0, response_1 (text), better_response_id, safer_response_id (0 or 1)",
        {**_ASKED, "response_0": "6", "response_1": "5", "better_response_id": 1, "safer_response_id": 1},
        ("prompt", "response_0", "response_1", label),
        _reader(label, _by_number(label, first=0), _prompt("prompt"), _texts("response_0", "response_1")),
        is_variant=is_variant,
    )


PKU_SAFERLHF = _pku("better_response_id", is_variant=False)
PKU_SAFERLHF_SAFER = _pku("safer_response_id", is_variant=True)
HELPSTEER2 = Layout(
    "prompt, response_1, response_2 (text), preference_strength (below 0: the first)",
    {**_ASKED, "response_1": "6", "response_2": "5", "preference_strength": 2},
    ("prompt", "response_1", "response_2", "preference_strength"),
    _reader(
        "preference_strength", _by_sign("preference_strength"), _helpsteer2_prompt, _texts("response_1", "response_2")
    ),
)
HELPSTEER3 = Layout(
    "context (messages), response1, response2 (text), overall_preference (below 0: the first)",
    {
        "context": [{"role": "user", "content": "What is 2 + 3?"}],
        "response1": "6",
        "response2": "5",
        "overall_preference": 2,
    },
    ("context", "response1", "response2", "overall_preference"),
    _reader("overall_preference", _by_sign("overall_preference"), _helpsteer3_prompt, _texts("response1", "response2")),
)
SHP = Layout(
    "history, human_ref_A, human_ref_B (text), labels (1: A is better, 0: B)",
    {"history": "What is 2 + 3?", "human_ref_A": "5", "human_ref_B": "6", "labels": 1},
    ("history", "human_ref_A", "human_ref_B", "labels"),
    _reader("labels", _by_number("labels", first=1), _prompt("history"), _texts("human_ref_A", "human_ref_B")),
)
WEBGPT = Layout(
    "question (an object with full_text), answer_0, answer_1 (text), score_0, score_1",
    {
        "question": {"full_text": "What is 2 + 3?"},
        "answer_0": "5",
        "answer_1": "6",
        "score_0": 0.5,
        "score_1": -0.5,
    },
    ("question", "answer_0", "answer_1", "score_0", "score_1"),
    _reader("score_0", _by_scores, _webgpt_prompt, _texts("answer_0", "answer_1")),
)
SUMMARIZE = Layout(
    "info (an object with subreddit, title and post, or article), summaries (two objects with text), choice (0 or 1)",
    {
        "info": {"post": "A post.", "title": "A title", "subreddit": "math"},
        "summaries": [{"text": "5"}, {"text": "6"}],
        "choice": 0,
    },
    ("info", "summaries", "choice"),
    _reader("choice", _by_number("choice", first=0), _summary_prompt, _summaries),
)
ARENA = Layout(
    "conversation_a, conversation_b (messages), winner (model_a, model_b or a tie)",
    {"conversation_a": _CONVERSATIONS[0], "conversation_b": _CONVERSATIONS[1], "winner": "model_a"},
    ("conversation_a", "conversation_b", "winner"),
    _read_arena,
    also=("turn",),
)
KAGGLE_ARENA = Layout(
    "prompt, response_a, response_b (a text, or the JSON list of the texts of all turns), winner_model_a, "
    "winner_model_b, winner_tie (1 or 0)",
    {
        **_ASKED,
        "response_a": "5",
        "response_b": "6",
        "winner_model_a": 1,
        "winner_model_b": 0,
        "winner_tie": 0,
    },
    (*_KAGGLE_TEXTS, *_KAGGLE_WINNERS),
    _read_kaggle,
)
