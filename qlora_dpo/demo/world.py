"""The demo's closed world: questions with a terse and an explained answer, in English and Chinese.

Every fact is asked in both languages and in several wordings. `pretraining_documents` shows the base model
all facts, mostly tersely; `training_questions` and `held_out_questions` split them for preference tuning.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from qlora_dpo.demo import facts

Language = Literal["en", "zh"]

HELD_OUT_EVERY = 5
FACTS_PER_CATEGORY = 30
# The base answers tersely, but the explained answer must keep a few percent: preference tuning can only
# raise what the model is already able to say.
EXPLAINED_CHAT_SHARE = 0.08
PROSE_SHARE = 0.08
# How an explained answer goes on is learned far more often than that it is the one to give; see Document.
CONTINUATION_SHARE = 0.36

WORDINGS: dict[tuple[str, Language], tuple[str, ...]] = {
    ("capital", "en"): (
        "What is the capital of {x}?",
        "Which city is the capital of {x}?",
        "Name the capital of {x}.",
    ),
    ("capital", "zh"): ("{x}的首都是哪里？", "{x}的首都是哪座城市？", "请说出{x}的首都。"),
    ("element", "en"): (
        "What is the chemical symbol of {x}?",
        "Which symbol stands for {x}?",
        "Give the symbol of {x}.",
    ),
    ("element", "zh"): ("{x}的化学符号是什么？", "哪个符号表示{x}？", "请写出{x}的元素符号。"),
    ("formula", "en"): (
        "What is the chemical formula of {x}?",
        "How is {x} written in chemistry?",
        "Give the formula of {x}.",
    ),
    ("formula", "zh"): ("{x}的化学式是什么？", "在化学中{x}怎么写？", "请写出{x}的化学式。"),
    ("river", "en"): (
        "Into which sea does the {x} flow?",
        "Where does the {x} reach the sea?",
        "Where does the {x} end?",
    ),
    ("river", "zh"): ("{x}流入哪片海？", "{x}在哪里入海？", "{x}最后流到哪里？"),
    ("animal", "en"): ("What kind of animal is {x}?", "To which group does {x} belong?", "Classify {x}."),
    ("animal", "zh"): ("{x}是什么动物？", "{x}属于哪一类动物？", "请给{x}分类。"),
    ("opposite", "en"): (
        "What is the opposite of {x}?",
        "Which word means the opposite of {x}?",
        "Give an antonym of {x}.",
    ),
    ("opposite", "zh"): ("{x}的反义词是什么？", "哪个词和{x}相反？", "请给出{x}的反义词。"),
    ("sum", "en"): ("What is {x} + {y}?", "How much is {x} plus {y}?", "Add {x} and {y}."),
    ("sum", "zh"): ("{x}加{y}等于多少？", "{x}+{y}是多少？", "请计算{x}加{y}。"),
    ("product", "en"): ("What is {x} × {y}?", "How much is {x} times {y}?", "Multiply {x} by {y}."),
    ("product", "zh"): ("{x}乘{y}等于多少？", "{x}×{y}是多少？", "请计算{x}乘{y}。"),
    ("unit", "en"): ("How many {y} are in {x}?", "How many {y} do {x} have?", "Convert {x} to {y}."),
    ("unit", "zh"): ("{x}是多少{y}？", "{x}有多少{y}？", "请把{x}换算成{y}。"),
}

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORDS_ZH = "零 一 两 三 四 五 六 七 八 九 十 十一 十二".split()
_MORE_THAN_TWELVE = {22: ("twenty-two", "二十二")}


@dataclass(frozen=True)
class Question:
    """One wording of one fact in one language, with its two answers and the string that proves it right."""

    prompt: str
    terse: str
    explained: str
    fact: str
    language: Language
    category: str


@dataclass(frozen=True)
class Document:
    """One pre-training example: a chat turn, or prose where `prompt` is None.

    With `instead_of`, nothing is learned up to the first token in which `text` differs from that other
    answer: the model learns how the answer goes on, but not to prefer it.
    """

    prompt: str | None
    text: str
    instead_of: str | None = None


@dataclass(frozen=True)
class _Answer:
    """A fact in one language: what fills the wordings' {x} and {y}, and the two answers."""

    x: str
    y: str
    terse: str
    explained: str
    fact: str


_Fact = dict[Language, _Answer]


def training_questions() -> list[Question]:
    """The questions for preference tuning: one wording per fact and language."""
    return _select(held_out=False)


def held_out_questions() -> list[Question]:
    """The questions that judge it, on facts that no training question asks in either language."""
    return _select(held_out=True)


def states_fact(answer: str, question: Question) -> bool:
    """Whether the claim that opens the answer (its first clause, after the verb) names the fact."""
    claim = re.split(r"=|等于|流入|是| is | are | into ", _clauses(answer)[0])[-1].strip()
    if not question.fact.isascii():
        return claim == question.fact
    ignore_case = re.IGNORECASE if question.fact.islower() else 0
    number_or_word = rf"(?<![A-Za-z0-9.-]){re.escape(question.fact)}(?![A-Za-z0-9]|\.\d)"
    return re.search(number_or_word, claim, ignore_case) is not None


def is_explained(answer: str, question: Question) -> bool:
    """Whether the answer is a finished sentence with at least one further clause, not the bare fact."""
    text = answer.strip()
    finished = text.endswith((".", "!", "。", "！"))
    clauses = [clause for clause in _clauses(text) if clause.strip()]
    return finished and len(clauses) >= 2 and len(text) >= 2 * len(question.terse)


def all_questions() -> list[Question]:
    """Every wording of every fact in both languages, those of the two splits included."""
    return [
        _question(category, language, answer, wording)
        for category, entries in _facts().items()
        for entry in entries
        for language, answer in entry.items()
        for wording in WORDINGS[category, language]
    ]


def pretraining_documents(rng: random.Random) -> Iterator[Document]:
    """One pass over all questions in random order: chat turns, mostly terse, and some prose."""
    questions = all_questions()
    rng.shuffle(questions)
    for question in questions:
        kind = rng.random()
        if kind < PROSE_SHARE:
            yield Document(None, f"{question.prompt} {question.explained}")
        elif kind < PROSE_SHARE + CONTINUATION_SHARE:
            yield Document(question.prompt, question.explained, instead_of=question.terse)
        elif rng.random() < EXPLAINED_CHAT_SHARE:
            yield Document(question.prompt, question.explained)
        else:
            yield Document(question.prompt, question.terse)


def _clauses(text: str) -> list[str]:
    return re.split(r"[.,:;!?](?:\s|$)|[，。：；！？\n]", text.strip())


def _select(held_out: bool) -> list[Question]:
    selected = []
    for category, entries in _facts().items():
        chosen = [entries[i * len(entries) // FACTS_PER_CATEGORY] for i in range(FACTS_PER_CATEGORY)]
        for i, entry in enumerate(chosen):
            if (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) != held_out:
                continue
            for language, answer in entry.items():
                wordings = WORDINGS[category, language]
                selected.append(_question(category, language, answer, wordings[i % len(wordings)]))
    return selected


def _question(category: str, language: Language, answer: _Answer, wording: str) -> Question:
    prompt = wording.format(x=answer.x, y=answer.y)
    return Question(prompt, answer.terse, answer.explained, answer.fact, language, category)


@cache
def _facts() -> dict[str, list[_Fact]]:
    """All facts by category, in an order that never changes."""
    return {
        "capital": list(_capitals()),
        "element": list(_elements()),
        "formula": list(_formulas()),
        "river": list(_rivers()),
        "animal": list(_animals()),
        "opposite": list(_opposites()),
        "sum": list(_sums()),
        "product": list(_products()),
        "unit": list(_units()),
    }


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.splitlines()]


def _upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def _capitals() -> Iterator[_Fact]:
    for country, city, country_zh, city_zh, continent in _rows(facts.CAPITALS):
        explained = f"The capital of {country} is {city}. {country} is a country in {continent}."
        explained_zh = f"答案是{city_zh}。{country_zh}是{facts.CONTINENTS[continent]}的国家。"
        yield {
            "en": _Answer(country, "", f"{city}.", explained, city),
            "zh": _Answer(country_zh, "", f"{city_zh}。", explained_zh, city_zh),
        }


def _elements() -> Iterator[_Fact]:
    for symbol, name, name_zh, number in _rows(facts.ELEMENTS):
        explained = f"The symbol of {name} is {symbol}. Its atomic number is {number}."
        explained_zh = f"答案是{symbol}。{name_zh}的原子序数是{number}。"
        yield {
            "en": _Answer(name, "", f"{symbol}.", explained, symbol),
            "zh": _Answer(name_zh, "", f"{symbol}。", explained_zh, symbol),
        }


def _formulas() -> Iterator[_Fact]:
    names = {symbol: (name, name_zh) for symbol, name, name_zh, _ in _rows(facts.ELEMENTS)}
    for substance, substance_zh, formula in _rows(facts.FORMULAS):
        parts, parts_zh = [], []
        for symbol, digits in re.findall(r"([A-Z][a-z]?)(\d*)", formula):
            count, count_zh = _number_words(int(digits or 1))
            name, name_zh = names[symbol]
            parts.append(f"{count} {name} atom" + ("" if count == "one" else "s"))
            parts_zh.append(f"{count_zh}个{name_zh}原子")
        atoms, atoms_zh = _listed(parts, " and "), _listed(parts_zh, "和", "、")
        explained = f"The formula of {substance} is {formula}, because it is made of {atoms}."
        explained_zh = f"答案是{formula}，因为{substance_zh}由{atoms_zh}组成。"
        yield {
            "en": _Answer(substance, "", f"{formula}.", explained, formula),
            "zh": _Answer(substance_zh, "", f"{formula}。", explained_zh, formula),
        }


def _number_words(count: int) -> tuple[str, str]:
    if count in _MORE_THAN_TWELVE:
        return _MORE_THAN_TWELVE[count]
    return _NUMBER_WORDS[count], _NUMBER_WORDS_ZH[count]


def _listed(parts: list[str], last: str, comma: str = ", ") -> str:
    """`a, b and c` from its parts."""
    return last.join(filter(None, [comma.join(parts[:-1]), parts[-1]]))


def _rivers() -> Iterator[_Fact]:
    for river, river_zh, sea, sea_zh, continent in _rows(facts.RIVERS):
        explained = f"The {river} flows into the {sea}. It is a river in {continent}."
        explained_zh = f"答案是{sea_zh}。{river_zh}是{facts.CONTINENTS[continent]}的河流。"
        yield {
            "en": _Answer(river, "", f"{sea}.", explained, sea),
            "zh": _Answer(river_zh, "", f"{sea_zh}。", explained_zh, sea_zh),
        }


def _animals() -> Iterator[_Fact]:
    for animal, animal_zh, group in _rows(facts.ANIMALS):
        group_en, group_zh, reason, reason_zh = facts.ANIMAL_CLASSES[group]
        explained = f"The answer is {group_en}, because {animal} {reason}."
        explained_zh = f"答案是{group_zh}，因为{animal_zh}{reason_zh}。"
        yield {
            "en": _Answer(animal, "", f"{_upper_first(group_en)}.", explained, group),
            "zh": _Answer(animal_zh, "", f"{group_zh}。", explained_zh, group_zh),
        }


def _opposites() -> Iterator[_Fact]:
    for word, opposite, word_zh, opposite_zh in _rows(facts.OPPOSITES):
        explained = f"The opposite of {word} is {opposite}, because nothing is both {word} and {opposite}."
        explained_zh = f"答案是{opposite_zh}，因为没有东西既{word_zh}又{opposite_zh}。"
        yield {
            "en": _Answer(word, "", f"{_upper_first(opposite)}.", explained, opposite),
            "zh": _Answer(word_zh, "", f"{opposite_zh}。", explained_zh, opposite_zh),
        }


def _pairs(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    return itertools.combinations_with_replacement(numbers, 2)


def _sums() -> Iterator[_Fact]:
    for x, y in _pairs(range(1, 11)):
        result = str(x + y)
        explained = f"The answer is {result}, because {result} - {y} = {x}."
        explained_zh = f"答案是{result}，因为{result}减{y}等于{x}。"
        yield {
            "en": _Answer(str(x), str(y), f"{result}.", explained, result),
            "zh": _Answer(str(x), str(y), f"{result}。", explained_zh, result),
        }


def _products() -> Iterator[_Fact]:
    for x, y in _pairs(range(2, 11)):
        result = str(x * y)
        explained = f"The answer is {result}, because {result} ÷ {y} = {x}."
        explained_zh = f"答案是{result}，因为{result}除以{y}等于{x}。"
        yield {
            "en": _Answer(str(x), str(y), f"{result}.", explained, result),
            "zh": _Answer(str(x), str(y), f"{result}。", explained_zh, result),
        }


def _units() -> Iterator[_Fact]:
    rows = _rows(facts.UNITS)
    for count, (unit, plural, smaller, unit_zh, smaller_zh, factor) in itertools.product(range(2, 6), rows):
        result = str(count * int(factor))
        explained = f"The answer is {result}, because one {unit} is {factor} {smaller}."
        explained_zh = f"答案是{result}，因为1{unit_zh}是{factor}{smaller_zh}。"
        yield {
            "en": _Answer(f"{count} {plural}", smaller, f"{result}.", explained, result),
            "zh": _Answer(f"{count}{unit_zh}", smaller_zh, f"{result}。", explained_zh, result),
        }
