"""The rules that a rules file may name, a class each: its fields are the rule's keys, its call is the score.

A score is between 0 and 1 and says how well the answer is what the rule's name says. None: the rule has nothing to say
about this row, because the row lacks what it needs.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from qlora_dpo.data.languages import UNKNOWN, language_of
from qlora_dpo.labeling.records import Candidates

Rule = Callable[[Candidates, str], float | None]

checked = pydantic_dataclass(frozen=True, config=ConfigDict(strict=True))

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
# A character of a script without spaces counts as a word.
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:['’-][^\W{_CJK}]+)*")
_SPACES = re.compile(r"\s+")
_REFUSES_WITHIN = 200  # characters; further on such words are about something else

REFUSALS = (
    "i cannot", "i can't", "i can not", "i'm sorry, but", "i am sorry, but", "sorry, i can", "i'm unable",
    "i am unable", "i'm not able to", "i am not able to", "i won't", "i will not", "i must decline",
    "i have to decline", "as an ai", "as a language model", "as a large language model", "it would not be appropriate",
    "it is not appropriate", "against my guidelines",
    "我无法", "我不能", "无法回答", "不能回答", "无法提供", "不能提供", "无法满足", "抱歉，", "抱歉,", "对不起，",
    "对不起,", "很遗憾", "作为一个人工智能", "作为人工智能", "作为一个ai", "作为ai", "作为一个语言模型",
    "作为一种人工智能", "作为语言模型",
)  # fmt: skip


@checked
class Length:
    """1 from `min` to `max` and 0 outside; with `target`, the smaller of both lengths divided by the larger."""

    min: int | None = None
    max: int | None = None
    target: int | None = None
    unit: Literal["characters", "words"] = "characters"

    def __post_init__(self) -> None:
        if self.min is None and self.max is None and self.target is None:
            raise ValueError("needs min, max or target")
        if self.target is not None and self.target < 1:
            raise ValueError(f"target is {self.target}; it must be above 0")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")

    def __call__(self, _: Candidates, answer: str) -> float:
        length = len(words(answer)) if self.unit == "words" else len(answer)
        if (self.min is not None and length < self.min) or (self.max is not None and length > self.max):
            return 0.0
        return 1.0 if self.target is None else min(length, self.target) / max(length, self.target)


@checked
class Regex:
    """1 where `match` is found and `forbid` is not; Python's regular expressions, over the whole answer."""

    match: str | None = None
    forbid: str | None = None
    ignore_case: bool = False

    def __post_init__(self) -> None:
        if self.match is None and self.forbid is None:
            raise ValueError("needs match or forbid")
        for name, pattern in (("match", self.match), ("forbid", self.forbid)):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{name} {pattern!r} is no regular expression: {error}") from None

    def __call__(self, _: Candidates, answer: str) -> float:
        flags = re.DOTALL | (re.IGNORECASE if self.ignore_case else 0)
        lacks = self.match is not None and not re.search(self.match, answer, flags)
        holds = self.forbid is not None and re.search(self.forbid, answer, flags)
        return float(not lacks and not holds)


@checked
class Language:
    """1 where the answer is in this `language` (an ISO 639 code such as en or zh, or `prompt` for that of the prompt's
    last message), 0.5 where it is too short to tell."""

    language: str

    def __post_init__(self) -> None:
        if self.language != "prompt" and not re.fullmatch("[a-z]{2,3}", self.language):
            raise ValueError(f"language {self.language!r} is neither an ISO 639 code nor `prompt`")

    def __call__(self, item: Candidates, answer: str) -> float | None:
        wanted = self.language
        if wanted == "prompt":
            wanted = _prompt_language(item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"])
        if wanted == UNKNOWN:
            return None
        found = language_of(answer)
        return 0.5 if found == UNKNOWN else float(found == wanted)


@checked
class JsonValid:
    """1 where the answer is JSON of this `type`, with these `keys`; white space around it is allowed, nothing else."""

    type: Literal["any", "object", "array"] = "any"
    keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.keys and self.type == "array":
            raise ValueError("keys are of an object, and type is array")

    def __call__(self, _: Candidates, answer: str) -> float:
        try:
            value = json.loads(answer, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        kinds = {"any": object, "object": dict, "array": list}
        is_kind = isinstance(value, dict if self.keys else kinds[self.type])
        return float(is_kind and all(key in value for key in self.keys))


@checked
class ReferenceOverlap:
    """How much of the row's `reference_answer` the answer has: chrF (Popović 2015) or the F1 of their words."""

    metric: Literal["chrf", "token_f1"] = "chrf"

    def __call__(self, item: Candidates, answer: str) -> float | None:
        if item.reference_answer is None:
            return None
        return chrf(answer, item.reference_answer) if self.metric == "chrf" else token_f1(answer, item.reference_answer)


@checked
class Refusal:
    """1 where the answer begins by refusing: one of English and Chinese phrases, or of `phrases`, in 200 characters."""

    phrases: tuple[str, ...] = ()

    def __call__(self, _: Candidates, answer: str) -> float:
        beginning = _SPACES.sub(" ", answer.strip()[:_REFUSES_WITHIN]).replace("’", "'").lower()
        return float(any(phrase.lower() in beginning for phrase in (*REFUSALS, *self.phrases)))


@checked
class Repetition:
    """The share of the answer's runs of `n` words that stood in it before."""

    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; it must be above 0")

    def __call__(self, _: Candidates, answer: str) -> float:
        found = words(answer)
        runs = [tuple(found[start : start + self.n]) for start in range(len(found) - self.n + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class AllOf:
    """As good as the worst of its rules."""

    rules: tuple[Rule, ...]

    def __call__(self, item: Candidates, answer: str) -> float | None:
        return min(_scores(self.rules, item, answer), default=None)


@dataclass(frozen=True)
class AnyOf:
    """As good as the best of its rules."""

    rules: tuple[Rule, ...]

    def __call__(self, item: Candidates, answer: str) -> float | None:
        return max(_scores(self.rules, item, answer), default=None)


@dataclass(frozen=True)
class Not:
    """1 minus the score of its rule."""

    rule: Rule

    def __call__(self, item: Candidates, answer: str) -> float | None:
        score = self.rule(item, answer)
        return None if score is None else 1 - score


KINDS: dict[str, type[Any]] = {
    "length": Length,
    "regex": Regex,
    "language": Language,
    "json_valid": JsonValid,
    "reference_overlap": ReferenceOverlap,
    "refusal": Refusal,
    "repetition": Repetition,
}


def words(text: str) -> list[str]:
    """The words of a text in small letters; each Chinese, Japanese or Korean character is one."""
    return [word.lower() for word in _WORD.findall(text)]


def chrf(answer: str, reference: str) -> float:
    """chrF of an answer, from 0 to 1."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().sentence_score(answer, [reference]).score) / 100


def token_f1(answer: str, reference: str) -> float:
    """F1 of the words of an answer, each as often as it occurs, from 0 to 1 (as SQuAD's)."""
    given, wanted = words(answer), words(reference)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


@lru_cache(maxsize=16)  # one prompt has several answers
def _prompt_language(prompt: str) -> str:
    return language_of(prompt)


def _scores(rules: tuple[Rule, ...], item: Candidates, answer: str) -> list[float]:
    return [score for rule in rules if (score := rule(item, answer)) is not None]


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")  # Python reads NaN and Infinity
