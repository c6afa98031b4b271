"""Belle's recipe: reference answers are chosen, the model's own answers rejected, no row is lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer

from qlora_dpo.cli import main
from qlora_dpo.labeling.reference_answers import answers_path

BASE = Path(__file__).resolve().parents[2] / "qlora_dpo" / "demo" / "base"

ROWS = [
    {"question": "one", "std_answer": "first", "class": "math"},
    {"question": "two", "std_answer": "", "class": "rewrite"},
    {"question": "three", "std_answer": "third", "class": "math"},
    {"question": "four", "std_answer": "fourth", "class": "code"},
    {"question": "five", "std_answer": "fifth"},
    {"question": "six", "std_answer": None},
]


def write(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(questions: Path, *more: str) -> list[str]:
    output = str(questions.with_name("pairs.jsonl"))
    return ["label", "reference", "--questions", str(questions), "--output", output, *more]


def pairs_of(questions: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in questions.with_name("pairs.jsonl").read_text().splitlines()]


def own_answer(request: dict[str, Any]) -> str:
    return {"three": "third", "four": " "}.get(request["messages"][-1]["content"], "my own")


def test_every_row_is_a_pair_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = write(tmp_path / "q.jsonl", ROWS)
    with OpenAIServer(own_answer) as server:
        command = arguments(questions, "--endpoint", server.url, "--endpoint_model", "m")
        assert main(command) == 0
        assert len(server.requests) == 4  # rows without a reference answer are not asked about
        assert main(command) == 0
        assert len(server.requests) == 4
    pairs = pairs_of(questions)
    assert [(row["prompt"], row["chosen"], row["rejected"], row.get("category")) for row in pairs] == [
        ("one", "first", "my own", "math"), ("five", "fifth", "my own", None),
    ]  # fmt: skip
    label = pairs[0]["label"]
    assert (label["method"], label["version"], label["origin"]) == ("reference", "m", f"{questions}:1")
    out = capsys.readouterr().out
    for said in (
        "4 of 6 rows have a reference answer", "left out: 2 rows without a reference answer", "2 pairs, 0 ties",
        "left out: 1 rows where the model gave the reference answer",
        "left out: 1 rows where the model gave an empty answer",
    ):  # fmt: skip
        assert said in out, out
    assert answers_path(tmp_path / "pairs.jsonl").is_file()


def test_a_run_that_gave_up_goes_on(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.jsonl", [{"question": f"q{row}", "std_answer": f"a{row}"} for row in range(20)])
    broken_from = 12

    def fault(_request: dict[str, Any]) -> str | None:
        return "401" if len(server.requests) > broken_from else None

    with OpenAIServer(own_answer, fault=fault) as server:
        command = arguments(questions, "--endpoint", server.url, "--endpoint_model", "m", "--concurrency", "1")
        assert main(command) == 69
        asked, broken_from = len(server.requests), 1000
        assert not questions.with_name("pairs.jsonl").exists()
        assert main(command) == 0
        assert len(server.requests) - asked == 20 - 12
    assert len(pairs_of(questions)) == 20


def test_a_file_without_reference_answers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = write(tmp_path / "q.jsonl", [{"question": "one", "answer": "x"}])
    assert main(arguments(questions, "--endpoint", "http://127.0.0.1:9/v1", "--endpoint_model", "m")) == 65
    assert "no row has a reference answer in the column 'std_answer'" in capsys.readouterr().err


def test_a_question_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = write(tmp_path / "q.jsonl", [*ROWS, {"frage": "one", "std_answer": "x"}])
    assert main(arguments(questions, "--model", str(BASE))) == 65
    assert f"{questions}:7: question: missing" in capsys.readouterr().err


@pytest.mark.slow
def test_belles_rows_become_pairs_that_train_reads(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (shared_data / "belle_eval_train.jsonl").read_text().splitlines()[:40]
    questions = tmp_path / "belle.jsonl"
    questions.write_text("\n".join(lines) + "\n")
    assert main(arguments(questions, "--model", str(BASE), "--max_new_tokens", "8", "--use_cpu")) == 0
    with_reference = [json.loads(line) for line in lines if json.loads(line)["std_answer"]]
    out = capsys.readouterr().out
    assert f"{len(with_reference)} of 40 rows have a reference answer" in out
    pairs = pairs_of(questions)
    empty = len(with_reference) - len(pairs)
    assert (f"left out: {empty} rows where the model gave an empty answer" in out) == (empty > 0)
    chosen = {row["question"]: row["std_answer"] for row in with_reference}
    assert all(pair["chosen"] == chosen[pair["prompt"]] for pair in pairs)
    assert {pair["category"] for pair in pairs} <= {row["class"] for row in with_reference}
    run = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--lora_r", "2", "--lora_alpha", "2", "--use_cpu"]
    assert main(["train", "--model_name_or_path", str(BASE), "--dataset", str(tmp_path / "pairs.jsonl"), *run]) == 0
