"""`data lint` over the text of rows: each rule finds its fault, alone among a thousand rows; good rows pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lint_rows import TENTH, found, good_rows, lint_texts, lint_tokens, other_end, row

from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.formats import ColumnNames
from qlora_dpo.data.linting.lint import lint_pairs, text_source, tokenized_source
from qlora_dpo.data.linting.report import RULES, LintReport
from qlora_dpo.data.linting.tokens import facts_of
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.errors import DataError

# The row at line 500, and the rules that must find it and nothing else.
FAULTS: dict[str, tuple[Any, set[str]]] = {
    "broken JSON": ('{"prompt": "a", ', {"bad_row"}),
    "no answer": (row("a") | {"chosen": " \n"}, {"missing_answer"}),
    "an answer of null": (row("a") | {"rejected": None}, {"missing_answer"}),
    "an invisible answer": (row("a") | {"rejected": "\u200b\u2060 \ufeff"}, {"empty_answer"}),
    "equal answers": (row("a") | {"rejected": row("a")["chosen"]}, {"equal_pair"}),
    "white space": (row("a") | {"rejected": row("a")["chosen"].replace(" ", "\n", 1)}, {"equal_but_for_space"}),
    "an end token as text": (row("a") | {"chosen": "Yes, it is.<|im_end|>"}, {"template_residue"}),
    "the next turn": (row("a") | {"chosen": "Yes, it is.\n\nHuman: And now?"}, {"template_residue"}),
    "a run-on rejected answer": (row("a") | {"rejected": "Yes.\n\nHuman: And now?"}, {"control_text"}),
    "a control token in a prompt": (row("a") | {"prompt": "What does <|im_start|> mean?"}, {"control_text"}),
    "labels the other way round": (
        TENTH | {"chosen": TENTH["rejected"], "rejected": TENTH["chosen"]},
        {"contradictory", "near_duplicate"},
    ),
    "the same pair": (TENTH, {"duplicate"}),
    "nearly the same pair": (other_end(TENTH), {"near_duplicate"}),
    "another prompt, the same answers": (TENTH | {"prompt": row("a")["prompt"]}, set()),
    "the same prompt, other answers": (row("a") | {"prompt": TENTH["prompt"]}, set()),
}  # fmt: skip


COMPARED = ("labels the other way round", "the same pair", "nearly the same pair", "an invisible answer")


@pytest.mark.parametrize(
    ("fault", "mode"), [*((fault, "text") for fault in FAULTS), *((fault, "tokens") for fault in COMPARED)]
)
def test_one_fault_in_a_thousand_rows_is_named(
    fault: str, mode: str, write_jsonl: Callable[..., str], chatml: Any
) -> None:
    bad, rules = FAULTS[fault]
    rows = good_rows(1000)
    rows[499] = bad
    path = write_jsonl(rows)
    report = lint_texts(path) if mode == "text" else lint_tokens(chatml, path)
    assert {name: found(report, name) for name in report.counts} == {name: ["500"] for name in rules}
    assert str(report.rows[next(iter(rules))][0]).startswith(f"{path}:500: ") if rules else report.lines(5)


def test_few_errors_of_a_kind_that_public_data_have_do_not_block(write_jsonl: Callable[..., str]) -> None:
    swapped = {"prompt": TENTH["prompt"], "chosen": TENTH["rejected"], "rejected": TENTH["chosen"]}
    few, many = lint_texts(write_jsonl([*good_rows(300), swapped])), lint_texts(write_jsonl([*good_rows(50), swapped]))
    assert few.counts["contradictory"] == many.counts["contradictory"] == 1
    assert (few.blocking(), many.blocking()) == ([], ["contradictory"])
    assert "contradictory blocks only above 1% of the pairs." in few.lines(5)


def test_places_that_are_not_used_are_not_looked_at(write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = [*good_rows(2500), TENTH, row("a") | {"chosen": "Yes.<|im_end|>"}]
    dataset = load_preference_dataset(write_jsonl(rows), tokenizer=chatml)
    facts = facts_of(chatml, 1024, 512)
    report = lint_pairs([tokenized_source(dataset)], train=range(9), held_out=[2500], facts=facts)
    assert not report.counts, report.lines(5)
    report = lint_pairs([tokenized_source(dataset)], train=[9, 2501], held_out=[2500], facts=facts)
    assert (found(report, "leaked_answer"), found(report, "template_residue")) == (["2501"], ["2502"])


def test_a_file_that_changes_meanwhile_is_noticed(write_jsonl: Callable[..., str], chatml: Any) -> None:
    path = write_jsonl(good_rows(5))
    dataset = load_preference_dataset(path, tokenizer=chatml)
    Path(path).write_text("\n" * 3 + Path(path).read_text())
    with pytest.raises(DataError, match="the file changed meanwhile"):
        lint_pairs([tokenized_source(dataset)], facts=facts_of(chatml, 1024, 512))


def test_refused_rows_keep_their_reasons(write_jsonl: Callable[..., str]) -> None:
    source = text_source(PairReader(open_source(write_jsonl([*good_rows(2), "[]"])), "auto", ColumnNames()))
    assert [type(refused) for refused in source.refused] == [RefusedRow]
    assert lint_pairs([source]).rows["bad_row"][0].detail == "json: a row must be an object (it is list)"


def test_a_report_survives_its_json(write_jsonl: Callable[..., str]) -> None:
    report = lint_texts(write_jsonl([*good_rows(20), TENTH, row("a") | {"chosen": "x</s>"}, "{"]))
    again = LintReport.from_json(json.loads(json.dumps(report.as_json())))
    assert again == report
    assert again.blocking() == ["bad_row", "template_residue"]


def test_every_rule_says_what_it_looks_at_and_what_to_do() -> None:
    assert all(rule.looks_at and rule.advice and rule.name == name for name, rule in RULES.items())
    assert all(rule.severity == "error" or not rule.tolerated for rule in RULES.values())


@pytest.mark.parametrize("name", ["belle_pairs_hh.jsonl", "hh_rlhf_harmless_600.jsonl"])
def test_real_pairs_are_not_blocked(name: str, shared_data: Path, tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("llama_hh")
    dataset = load_preference_dataset(str(shared_data / name), tokenizer=tokenizer, bad_rows="skip")
    report = lint_pairs([tokenized_source(dataset)], facts=facts_of(tokenizer, 1024, 512), bad_rows="known")
    assert report.blocking() == [], report.lines(0)
    assert {"bos", "end_token", "boundary", "round_trip", "unknown_token"}.isdisjoint(report.counts)
