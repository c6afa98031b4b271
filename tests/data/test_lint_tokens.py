"""`data lint` over token ids: BOS, end, unknown tokens, and the way from text to ids and back."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lint_rows import found, good_rows, lint_tokens

from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.linting.tokens import BATCH_RULES, SAMPLE_RULES, facts_of
from qlora_dpo.data.preferences import PreferencePair
from qlora_dpo.data.ragged import Ragged


def dialogue(answer: str) -> list[dict[str, str]]:
    turns = ("Write a question.", "What is 2 + 3?", "And the answer?", answer)
    return [{"role": ("user", "assistant")[place % 2], "content": said} for place, said in enumerate(turns)]


def test_good_pairs_pass_with_every_kind_of_tokenizer(tokenizer: Any, write_jsonl: Callable[..., str]) -> None:
    report = lint_tokens(tokenizer, write_jsonl([{"chosen": dialogue("5"), "rejected": dialogue("6 é")}]))
    assert not report.counts, report.lines(5)
    plain = {"prompt": "Hello there, what is the answer?", "chosen": "The answer is helpful.", "rejected": "No answer."}
    assert not lint_tokens(tokenizer, write_jsonl([plain], "plain.jsonl")).counts


def batch_of(*rows: tuple[list[int], list[int], list[int]]) -> tuple[Ragged, Ragged, Ragged]:
    columns = zip(*rows, strict=True)
    prompt, chosen, rejected = (Ragged.of(np.array(ids, np.int32) for ids in column) for column in columns)
    return prompt, chosen, rejected


def broken_ids(bos: int, end: int) -> dict[str, tuple[tuple[list[int], list[int], list[int]], list[str]]]:
    good = [20, 21, end]
    return {
        "good": (([bos, 5, 6], good, [22, end]), []),
        "no BOS": (([5, 6], good, [22, end]), ["bos"]),
        "BOS twice": (([bos, bos, 5], good, [22, end]), ["bos"]),
        "BOS in an answer": (([bos, 5], [20, bos, end], [22, end]), ["bos"]),
        "no end": (([bos, 5], [20, 21], [22, end]), ["end_token"]),
        "the end twice": (([bos, 5], [20, end, end], [22, end]), ["end_token"]),
        "cut": (([bos, 5], [20] * 8, [22, end]), []),
        "an empty answer": (([bos, 5], good, []), ["end_token"]),
    }


@pytest.mark.parametrize("case", broken_ids(0, 0))
def test_broken_ids_are_found(case: str, tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("llama3")
    facts = facts_of(tokenizer, 10, 5)
    rows, rules = broken_ids(tokenizer.bos_token_id, facts.end_id)[case]
    batch = batch_of(([facts.bos_id or 0, 9], [30, facts.end_id], [31, facts.end_id]), rows)
    assert [(rule.name, place) for rule in BATCH_RULES for place, _ in rule.check(batch, facts)] == [
        (rule, 1) for rule in rules
    ]


def test_ids_of_another_text_are_found(chatml: Any, write_jsonl: Callable[..., str]) -> None:
    dataset = load_preference_dataset(write_jsonl(good_rows(3)), tokenizer=chatml)
    texts = [pair for pair in dataset.texts if isinstance(pair, PreferencePair)]
    facts = facts_of(chatml, 1024, 512)
    boundary, round_trip = SAMPLE_RULES
    assert not list(boundary.check(texts, dataset[:], facts)) + list(round_trip.check(texts, dataset[:], facts))
    texts[1] = replace(texts[1], prompt="Another question?")
    texts[2] = replace(texts[2], rejected="Another answer.")
    assert [place for place, _ in boundary.check(texts, dataset[:], facts)] == [1, 2]
    ((place, detail),) = round_trip.check(texts, dataset[:], facts)
    assert place == 2
    assert detail.startswith("rejected becomes another text: 'Another answ' becomes ")


def test_characters_without_tokens_are_found(write_jsonl: Callable[..., str]) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "w7", "chosen": f"w8 {word}", "rejected": "w10"} for word in ("w9", "new")]
    report = lint_tokens(tokenizer, write_jsonl(rows))
    assert found(report, "unknown_token") == found(report, "round_trip") == ["2"]
    assert not report.blocking()


def test_a_row_is_counted_once_whatever_a_rule_says_of_it(write_jsonl: Callable[..., str]) -> None:
    from tiny import tiny_tokenizer

    rows = [
        {"prompt": "w7", "chosen": "w8 new", "rejected": "w10 other"},
        {"prompt": "w7", "chosen": "w8", "rejected": "w9"},
    ]
    report = lint_tokens(tiny_tokenizer(), write_jsonl(rows))
    assert report.counts["unknown_token"] == len(found(report, "unknown_token")) == 1
    detail = report.rows["unknown_token"][0].detail
    assert "1 tokens of chosen" in detail
    assert "; 1 tokens of rejected" in detail


def test_a_template_that_writes_the_date_is_named(chatml: Any, write_jsonl: Callable[..., str]) -> None:
    tokenizer, path = copy(chatml), write_jsonl(good_rows(3))
    assert "date_in_template" not in lint_tokens(tokenizer, path).counts
    tokenizer.chat_template = chatml.chat_template.replace("Be helpful.", "' ~ strftime_now('%d %b %Y') ~ '")
    report = lint_tokens(tokenizer, path)
    assert [finding.origin for finding in report.rows["date_in_template"]] == ["all rows"]
    assert not report.blocking()
