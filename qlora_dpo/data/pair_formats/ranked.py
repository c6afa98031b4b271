"""Rows that rank or rate several answers to one prompt: Nectar, UltraFeedback, `generations` with `ratings`.

The best answer is chosen against each that is worse, or against the worst alone; where several are best or worst, the
first of them is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_dpo.data.pair_formats.layout import Layout, Prompt, number_of, text_prompt
from qlora_dpo.data.preferences import NoPreferenceError, ParsedPair, PreferencePair, RowError
from qlora_dpo.data.values import Values, clean_text, kind, value_of

LEFT_OUT_ANSWERS = "answers that are empty, or the same as the best one, not compared"

Rated = tuple[float, str]
"""How good an answer is, and its text."""


def _reader(
    column: str, prompt: Callable[[Values], Prompt], answers: Callable[[Values], list[Rated]], *, each: bool
) -> Callable[[Values], ParsedPair]:
    """Reads rows whose answers are rated in `column`; `each` pairs the best answer with every one that is worse."""

    def read(values: Values) -> ParsedPair:
        given = answers(values)
        rated = [(score, text) for score, text in given if text.strip()]
        if not rated:
            raise RowError(column, "holds no answer that is not empty")
        best, chosen = max(rated, key=_score)
        others = [(score, text) for score, text in rated if text != chosen]
        worse = [(score, text) for score, text in others if score < best]
        if not worse:
            raise NoPreferenceError(column, "no answer is better than another")
        rejected = worse if each else [min(worse, key=_score)]
        asked = prompt(values)
        pairs = [PreferencePair(asked, chosen, text) for _, text in rejected]
        repairs = (LEFT_OUT_ANSWERS,) if len(others) < len(given) - 1 else ()
        return ParsedPair(pairs[0], repairs, tuple(pairs[1:]))

    return read


def _score(rated: Rated) -> float:
    return rated[0]


def _objects(values: Values, column: str) -> list[dict[str, Any]]:
    items = value_of(values, column)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RowError(column, f"must be a list of objects (it is {kind(items)})")
    return items


def _nectar_answers(values: Values) -> list[Rated]:
    return [
        (-_number(f"answers[{number}].rank", item.get("rank")), clean_text(f"answers[{number}]", item.get("answer")))
        for number, item in enumerate(_objects(values, "answers"))
    ]


def _number(field: str, value: object) -> float:
    return number_of({field: value}, field)


def _completions(values: Values) -> list[Rated]:
    return [
        (_rating(f"completions[{number}]", item), clean_text(f"completions[{number}].response", item.get("response")))
        for number, item in enumerate(_objects(values, "completions"))
    ]


def _rating(field: str, completion: dict[str, Any]) -> float:
    """UltraFeedback's `overall_score`, else the mean of the ratings of its aspects."""
    if completion.get("overall_score") is not None:
        return _number(f"{field}.overall_score", completion["overall_score"])
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    ratings = [found for aspect in aspects for found in _aspect_ratings(aspect)]
    if not ratings:
        raise RowError(field, "neither overall_score nor a rating in annotations")
    return sum(ratings) / len(ratings)


def _aspect_ratings(aspect: object) -> list[float]:
    """The rating of one aspect, which is a number or its text; `N/A` is none."""
    rating = aspect.get("Rating") if isinstance(aspect, dict) else None
    try:
        return [] if rating is None else [float(rating)]
    except (TypeError, ValueError):
        return []


def _generations(values: Values) -> list[Rated]:
    texts, ratings = value_of(values, "generations"), value_of(values, "ratings")
    if not isinstance(texts, list) or not isinstance(ratings, list) or len(texts) != len(ratings):
        raise RowError("ratings", "must be a list as long as generations")
    return [
        (_number(f"ratings[{number}]", rating), clean_text(f"generations[{number}]", text))
        for number, (text, rating) in enumerate(zip(texts, ratings, strict=True))
    ]


def _prompt_in(*columns: str) -> Callable[[Values], Prompt]:
    def prompt(values: Values) -> Prompt:
        column = next((column for column in columns if column in values), columns[0])
        return text_prompt(values, column)

    return prompt


def _nectar(*, each: bool) -> Layout:
    return Layout(
        "prompt, answers (objects with answer and rank)",
        {"prompt": "What is 2 + 3?", "answers": [{"answer": "5", "rank": 1}, {"answer": "6", "rank": 2}]},
        ("prompt", "answers"),
        _reader("answers", _prompt_in("prompt"), _nectar_answers, each=each),
        is_variant=not each,
    )


NECTAR = _nectar(each=True)
NECTAR_BEST_WORST = _nectar(each=False)
ULTRAFEEDBACK = Layout(
    "instruction, completions (objects with response, overall_score or annotations)",
    {
        "instruction": "What is 2 + 3?",
        "completions": [{"response": "5", "overall_score": 9.0}, {"response": "6", "overall_score": 2.5}],
    },
    ("instruction", "completions"),
    _reader("completions", _prompt_in("instruction"), _completions, each=False),
)
_QUESTIONS = ("prompt", "instruction", "input")
GENERATIONS = Layout(
    "prompt or instruction, generations (texts), ratings (as many numbers)",
    {"prompt": "What is 2 + 3?", "generations": ["5", "6"], "ratings": [9.0, 2.5]},
    ("generations", "ratings"),
    _reader("ratings", _prompt_in(*_QUESTIONS), _generations, each=False),
    also=_QUESTIONS,
)
