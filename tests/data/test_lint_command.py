"""`data lint`, the command: it blocks, warns, writes, and refuses what it would ignore."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lint_rows import good_rows, row

from qlora_dpo.cli import main


def test_the_command_blocks_warns_and_writes(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write_jsonl([*good_rows(5), row("a") | {"chosen": "\u200b"}]), tmp_path / "lint.json"
    assert main(["data", "lint", file, "--json", str(output)]) == 65
    printed = capsys.readouterr()
    assert f"{file}:6: empty_answer: chosen holds nothing that can be seen" in printed.out
    assert "no tokenizer was named" in printed.out
    assert f"{file}:6: empty_answer" in printed.err
    written = json.loads(output.read_text())
    assert written["blocking"] == ["empty_answer"]
    assert written["rules"]["empty_answer"]["rows"][0]["origin"] == f"{file}:6"
    assert main(["data", "lint", file, "--lint", "warn"]) == 0
    assert main(["data", "lint", write_jsonl(good_rows(5))]) == 0
    assert "nothing was found" in capsys.readouterr().out


def test_the_command_counts_rows_that_training_would_skip(
    write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl([*good_rows(5), "{"])
    assert main(["data", "lint", file]) == 65
    assert main(["data", "lint", file, "--bad_rows", "skip"]) == 0
    assert f"{file}:6: skipped_row: json: broken JSON" in capsys.readouterr().out


def test_the_command_refuses_what_it_would_ignore(
    write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(good_rows(2))
    assert main(["data", "lint", file, "--preview", "1"]) == 2
    assert main(["data", "lint", file, "--max_length", "64"]) == 2
    assert "--max_length 64 would be ignored: no tokenizer is named" in capsys.readouterr().err


def test_the_command_shows_tokens(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads(pairs_file.read_text().splitlines()[0])
    assert main(["data", "lint", str(pairs_file), "--model_name_or_path", str(model_folder), "--preview", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pairs_file}:1"
    assert lines[4] == "    " + "|".join([*first["chosen"].split(), "</s> <- end"])
    assert lines[7] == f"{pairs_file}:2"


def test_the_command_reads_every_source_of_a_mixture(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_jsonl(good_rows(5), "good.jsonl")
    other = write_jsonl([{"question": "b", "chosen": "\u200b", "rejected": "no"}, good_rows(1)[0]], "other.jsonl")
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("sources: [{path: good.jsonl}, {path: other.jsonl, prompt_key: question}]")
    output = tmp_path / "lint.json"
    assert main(["data", "lint", str(mixture), "--json", str(output)]) == 65
    assert f"{other}:1: empty_answer" in capsys.readouterr().out
    assert json.loads(output.read_text())["files"] == [good, other]
    assert main(["data", "lint", str(mixture), "--prompt_key", "question"]) == 2
    assert "--prompt_key would be ignored" in capsys.readouterr().err
    assert main(["data", "inspect", str(mixture)]) == 2
    assert "inspect its sources one by one" in capsys.readouterr().err
