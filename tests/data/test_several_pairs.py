"""Rows that hold several pairs, or prefer neither answer: every row is accounted for, and texts match token ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main
from qlora_dpo.data.dataset import PairDataset, load_preference_dataset
from qlora_dpo.data.linting.lint import kept_texts, lint_pairs, tokenized_source
from qlora_dpo.errors import DataError
from qlora_dpo.labeling.candidates import Candidates, read_candidates
from qlora_dpo.labeling.prompts import load_prompts


def ranked(prompt: str, *answers: str) -> dict[str, Any]:
    """A row of Nectar; `=` before an answer gives it the rank of the one before."""
    rank, items = 0, []
    for answer in answers:
        rank += not answer.startswith("=")
        items.append({"answer": answer.lstrip("="), "rank": rank})
    return {"prompt": prompt, "answers": items}


ROWS = [ranked("p", "best", "good", "bad"), ranked("q", "x", "=y"), ranked("r", "one", "two")]
PAIRS = [("p", "best", "good"), ("p", "best", "bad"), ("r", "one", "two")]


@pytest.fixture
def dataset(chatml: Any, write_jsonl: Callable[..., str], tmp_path: Path) -> PairDataset:
    return load_preference_dataset(write_jsonl(ROWS, "rows.jsonl"), tokenizer=chatml, cache_dir=tmp_path)


def test_ties_stop_nothing_and_every_row_is_accounted_for(dataset: PairDataset) -> None:
    report = dataset.report
    assert (report.rows_read, report.pairs, report.further_pairs, len(report.refused)) == (3, 3, 1, 1)
    assert report.bad_rows == [] and report.refused[0].left_out
    text = "\n".join(report.summary())
    assert "3 pairs from 3 rows (nectar)" in text and "ranked: 1 more pairs than rows" in text
    assert "left out: 1 rows" in text and "1 x answers: no answer is better than another" in text
    assert "refused" not in text.replace("refused_rows.jsonl", "")


def test_the_account_is_the_same_from_the_cache(dataset: PairDataset, chatml: Any, tmp_path: Path) -> None:
    again = load_preference_dataset(dataset.report.source, tokenizer=chatml, cache_dir=tmp_path)
    assert again.report.from_cache
    assert (again.report.refused, again.report.further_pairs) == (dataset.report.refused, 1)


def test_texts_and_token_ids_agree_in_order_and_origin(dataset: PairDataset) -> None:
    texts = [pair for _, pair in kept_texts(tokenized_source(dataset))]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in texts] == PAIRS
    assert [pair.origin for pair in texts] == dataset.origins() == [pair.origin for pair in dataset]
    assert [origin.rpartition(":")[2] for origin in dataset.origins()] == ["1", "1#2", "3"]


def test_texts_are_found_where_the_tokenizer_refused_a_further_pair(
    dataset: PairDataset, chatml: Any, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    rows = [ranked("p", "best answer", "best answer but longer", "no"), *ROWS[2:]]
    room = len(dataset[0].prompt_ids)
    dataset = load_preference_dataset(
        write_jsonl(rows, "longer.jsonl"),
        tokenizer=chatml,
        cache_dir=tmp_path,
        max_length=room + 1,
        max_prompt_length=room,
    )
    kept = [pair.rejected for _, pair in kept_texts(tokenized_source(dataset))]
    assert kept == ["no", "two"]
    report = dataset.report
    assert report.rows_read + report.further_pairs == report.pairs + len(report.refused) == 3


def test_lint_counts_ties_as_what_they_are(dataset: PairDataset) -> None:
    report = lint_pairs([tokenized_source(dataset)])
    assert "no_preference" in "\n".join(report.lines(5))
    assert not report.as_json()["rules"].get("bad_row")


def test_ties_alone_are_no_pairs(chatml: Any, write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 1 rows.*\n.*no answer is better") as error:
        load_preference_dataset(write_jsonl(ROWS[1:2], "rows.jsonl"), tokenizer=chatml, cache_dir=tmp_path)
    assert "--dataset_format" not in str(error.value)


def test_inspect_convert_and_mix_count_rows_and_pairs(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write_jsonl(ROWS, "rows.jsonl"), tmp_path / "pairs.jsonl"
    assert main(["data", "inspect", file]) == 0
    assert "3 pairs from 3 rows (nectar)\nleft out: 1 rows\n" in capsys.readouterr().out
    assert main(["data", "convert", file, "--to", "plaintext", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "3 pairs from 3 rows (nectar)" in out and "left out: 1 rows, listed in" in out
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in written] == PAIRS
    (tmp_path / "mix.yaml").write_text("sources:\n  - path: rows.jsonl\n")
    assert main(["data", "mix", str(tmp_path / "mix.yaml"), "--output", str(tmp_path / "mixed.jsonl")]) == 0
    assert "3 pairs from 3 rows (nectar)" in capsys.readouterr().err
    assert len((tmp_path / "mixed.jsonl").read_text().splitlines()) == 3


def test_labellers_get_all_answers_of_a_row_and_prompts_are_read(write_jsonl: Callable[..., str]) -> None:
    votes = [{"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": label} for label in (1, 0)]
    first, second = read_candidates(write_jsonl(votes, "votes.jsonl"))
    assert isinstance(first, Candidates) and isinstance(second, Candidates)
    assert set(first.answers) == {"x", "y"} and first.answers == second.answers  # they do not tell who won
    rated = [
        {"prompt": "p", "generations": ["a", "b", "c"], "ratings": [1, 2, 3]},
        {"instruction": "q", "generations": ["a", "b"], "ratings": [1, 1]},
    ]
    keys = {"prompt_key": "question", "reference_answer_key": "reference_answer", "category_key": "category"}
    assert [row.prompt for row in load_prompts(write_jsonl(rated, "rated.jsonl"), "fail", **keys)] == ["p"]
