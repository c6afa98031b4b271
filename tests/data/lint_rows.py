"""Rows to lint, and their reports."""

from __future__ import annotations

import random
from typing import Any

from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.formats import ColumnNames
from qlora_dpo.data.linting.lint import lint_pairs, text_source, tokenized_source
from qlora_dpo.data.linting.report import LintReport
from qlora_dpo.data.linting.tokens import facts_of
from qlora_dpo.data.pair_reader import PairReader

WORDS = ["amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "lagoon"]


def text(seed: object, words: int) -> str:
    return " ".join(random.Random(repr(seed)).choices(WORDS, k=words))


def row(number: object, words: int = 12) -> dict[str, Any]:
    answers = (text(("first", number), words), text(("second", number), words))
    return {"prompt": f"Tell me of {text(('prompt', number), words)}", "chosen": answers[0], "rejected": answers[1]}


def good_rows(count: int) -> list[Any]:
    return [row(number) if number >= 10 else row(number, 60) for number in range(count)]


def other_end(given: dict[str, Any]) -> dict[str, Any]:
    return {key: f"{value} pebble" for key, value in given.items()}


def lint_texts(path: str, held_out: str | None = None) -> LintReport:
    files = [path, *([held_out] if held_out else [])]
    sources = [text_source(PairReader(open_source(file), "auto", ColumnNames())) for file in files]
    return lint_all(sources, None)


def lint_tokens(tokenizer: Any, path: str, held_out: str | None = None) -> LintReport:
    files = [path, *([held_out] if held_out else [])]
    datasets = [load_preference_dataset(file, tokenizer=tokenizer, bad_rows="skip") for file in files]
    return lint_all([tokenized_source(dataset) for dataset in datasets], facts_of(tokenizer, 1024, 512))


def lint_all(sources: list[Any], facts: Any) -> LintReport:
    first = len(sources[0].origins)
    places = range(sum(len(source.origins) for source in sources))
    return lint_pairs(sources, train=places[:first], held_out=places[first:], facts=facts)


def found(report: LintReport, rule: str) -> list[str]:
    return [finding.origin.rpartition(":")[2] for finding in report.rows.get(rule, [])]


TENTH = row(9, 60)
