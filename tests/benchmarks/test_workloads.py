"""The benchmarks' pairs: real where the texts are, and of the same lengths where they are not."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from benchmarks import workloads
from benchmarks.workloads import LENGTHS_FILE, WORKLOADS, make_pairs, random_rows, stored_lengths, unshared_tokens

REAL = [name for name, workload in WORKLOADS.items() if workload.texts is not None]


def lengths_of(rows: list[workloads.Row]) -> list[workloads.Lengths]:
    return [(len(row["prompt_ids"]), len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]


@pytest.mark.parametrize("name", REAL)
def test_stored_lengths_are_those_of_the_real_texts(shared_data: Path, name: str) -> None:
    pairs = make_pairs(name, len(stored_lengths(name)))
    assert pairs.source.startswith("real")
    assert lengths_of(pairs.rows) == stored_lengths(name)


@pytest.mark.parametrize("name", REAL)
def test_without_the_texts_the_lengths_are_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(workloads, "REAL_FILE", tmp_path / "absent.jsonl")
    pairs = make_pairs(name, 20)
    assert pairs.source.startswith("random")
    assert lengths_of(pairs.rows) == stored_lengths(name)[:20]
    assert pairs.rows == make_pairs(name, 20).rows


def test_stored_lengths_are_numbers_and_nothing_else() -> None:
    stored = json.loads(LENGTHS_FILE.read_text(encoding="utf-8"))
    assert sorted(stored) == sorted(REAL)
    for rows in stored.values():
        assert all(len(row) == 3 and all(isinstance(count, int) and count > 0 for count in row) for row in rows)


def test_multi_turn_has_its_mean_lengths() -> None:
    means = [statistics.mean(column) for column in zip(*stored_lengths("multi_turn"), strict=True)]
    assert means == pytest.approx([138, 135, 52], rel=0.05)


def test_long_prompts_differ_and_a_large_vocabulary_is_used() -> None:
    long_prompts = make_pairs("long_prompt", 3).rows
    assert lengths_of(long_prompts) == [(1000, 200, 200)] * 3
    assert long_prompts[0] != long_prompts[1]
    large = make_pairs("vocabulary_152k", 20).rows
    assert lengths_of(large) == stored_lengths("multi_turn")[:20]
    assert 32_000 < max(max(row["prompt_ids"]) for row in large) < 152_000


def test_pairs_begin_again_after_the_last() -> None:
    count = len(WORKLOADS["tiny"].lengths())
    rows = make_pairs("tiny", count + 2).rows
    assert lengths_of(rows[count:]) == lengths_of(rows[:2])


def test_unshared_tokens_count_the_prompt_twice() -> None:
    assert unshared_tokens(random_rows([(10, 3, 2), (1, 1, 1)], 64)) == 25 + 4
