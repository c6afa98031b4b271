"""`data lint` over rows together: both sides of the split, lengths, truncation, near-duplicates."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lint_rows import found, good_rows, lint_texts, lint_tokens, other_end, row, text

from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.linting.duplicates import SIMILAR, TOKENS, Signer, earliest_similar
from qlora_dpo.data.linting.lint import lint_pairs, tokenized_source
from qlora_dpo.data.linting.sets import length_bias
from qlora_dpo.data.linting.tokens import facts_of
from qlora_dpo.data.ragged import Ragged


def test_what_is_on_both_sides_is_found(write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = good_rows(100)
    held_out = [
        rows[3],
        row("new") | {"prompt": rows[5]["prompt"]},
        row("new") | {"prompt": other_end(rows[7])["prompt"]},
        row("other"),
        row("new") | {"prompt": rows[8]["prompt"], "rejected": rows[8]["chosen"]},
    ]
    files = write_jsonl(rows), write_jsonl(held_out, "held_out.jsonl")
    for report in (lint_texts(*files), lint_tokens(chatml, *files)):
        assert found(report, "leaked_answer") == ["1", "5"]
        assert found(report, "leaked_prompt") == ["2"]
        assert found(report, "nearly_leaked_prompt") == ["3"]
        assert report.blocking() == ["leaked_answer"]
        assert report.held_out == 5


@pytest.mark.parametrize(("longer", "is_biased"), [(50, False), (60, False), (80, True), (15, True)])
def test_length_bias_is_found(longer: int, is_biased: bool, write_jsonl: Callable[..., str]) -> None:
    rows = [
        row(number) | dict(zip(("chosen", "rejected"), order, strict=True))
        for number in range(100)
        for long, short in [(text(("l", number), 40), text(("s", number), 30))]
        for order in [(long, short) if number < longer else (short, long)]
    ]
    report = lint_texts(write_jsonl(rows))
    assert bool(report.counts["length_bias"]) == is_biased
    assert not report.blocking()


def test_correlation_of_length_and_label_is_pearsons() -> None:
    chosen, rejected = np.array([5, 9, 2, 7]), np.array([3, 4, 6, 7])
    lengths = np.concatenate([chosen - rejected, rejected - chosen])
    labels = np.repeat([1, -1], 4)
    share, correlation = length_bias(chosen, rejected)
    assert share == pytest.approx(2 / 3)
    assert correlation == pytest.approx(np.corrcoef(lengths, labels)[0, 1])


def test_answers_that_are_cut_are_counted(write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = [row(number, 60) for number in range(20)]
    rows[3] = rows[3] | {"rejected": rows[3]["chosen"] + " but not really"}
    dataset = load_preference_dataset(
        write_jsonl(rows), tokenizer=chatml, max_length=100, max_prompt_length=50, bad_rows="skip"
    )
    report = lint_pairs([tokenized_source(dataset)], facts=facts_of(chatml, 100, 50))
    assert found(report, "equal_after_cut") == ["4"]
    assert "100% of the answers lose their end" in report.rows["many_cut"][0].detail
    assert not report.blocking()


@pytest.mark.parametrize("mode", ["text", "tokens"])
def test_a_common_system_prompt_makes_no_near_duplicates(
    mode: str, write_jsonl: Callable[..., str], chatml: Any
) -> None:
    system = {"role": "system", "content": text("system", 300)}
    rows = [
        {"prompt": [system, {"role": "user", "content": text(number, 20)}], "chosen": f"{number}.", "rejected": "No."}
        for number in range(60)
    ]
    files = write_jsonl(rows[:40]), write_jsonl(rows[40:], "held_out.jsonl")
    report = lint_texts(*files) if mode == "text" else lint_tokens(chatml, *files)
    assert not report.counts["near_duplicate"] + report.counts["nearly_leaked_prompt"], report.lines(5)


def test_near_duplicates_are_those_of_exact_comparison() -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 5000, 120) for _ in range(200)]
    for number in range(100):  # 1 to 10 tokens changed
        copy = rows[number].copy()
        copy[draw.choice(120, 1 + number % 10, replace=False)] = draw.integers(0, 5000, 1 + number % 10)
        rows.append(copy)
    signatures = Signer(TOKENS, []).sign(Ragged.of(rows))
    partners = earliest_similar([signatures], np.arange(300))
    runs = [{tuple(ids[place : place + TOKENS.run]) for place in range(120 - TOKENS.run + 1)} for ids in rows]
    exact = np.array([len(runs[n] & runs[n + 200]) / len(runs[n] | runs[n + 200]) for n in range(100)])
    is_found = partners[200:] == np.arange(100)
    assert (partners[:200] == -1).all()
    assert is_found[exact > SIMILAR + 0.1].all()
    assert not is_found[exact < SIMILAR - 0.2].any()
    assert 20 < is_found.sum() < 80


def test_huge_answers_take_seconds(write_jsonl: Callable[..., str]) -> None:
    draw = random.Random(0)
    huge = [draw.randbytes(1_500_000).hex() for _ in range(2)]
    rows = [row(number) for number in range(30)]  # more than are compared without a look at what they have in common
    path = write_jsonl([*rows, {"prompt": "Go on", "chosen": huge[0], "rejected": huge[1]}])
    before = time.process_time()
    report = lint_texts(path)
    assert time.process_time() - before < 5
    assert not report.counts
