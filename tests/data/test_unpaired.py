"""`data pair`, and what is said of rows with one answer each where pairs are needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main
from qlora_dpo.data.conversations import ConversationColumns, detect_conversation_format, parse_conversation
from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.formats import detect_format
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import ColumnNames, RowError
from qlora_dpo.errors import UsageError


def kto(prompt: str, completion: str, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def paired(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[tuple[str, str, str]], str]]:
    """What the command writes, as (question, chosen, rejected), and says."""

    def run(rows: list[dict[str, Any]], *options: str, code: int = 0) -> tuple[list[tuple[str, str, str]], str]:
        output = tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)  # rows that are there are never written over
        assert main(["data", "pair", write_jsonl(rows, "in.jsonl"), "--output", str(output), *options]) == code
        printed = capsys.readouterr()
        lines = output.read_text().splitlines() if output.exists() else []
        found = [json.loads(line) for line in lines]
        texts = [
            (row["prompt"][-1]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in found
        ]
        return texts, printed.out + printed.err

    return run


Paired = Callable[..., tuple[list[tuple[str, str, str]], str]]


def test_good_and_bad_answers_to_a_prompt_are_pairs_and_the_rest_is_counted(paired: Paired) -> None:
    rows = [
        kto("p", "good", True),
        kto("q", "alone", False),
        kto("p", "bad", False),
        kto("p", "fine", True),
        kto("p", "poor", False),
        kto("p", "third", True),
    ]
    found, out = paired(rows)
    assert found == [("p", "good", "poor"), ("p", "fine", "bad")]
    assert "2 pairs from 6 rows (completion, by label)" in out and "left out: 2 rows without a partner" in out


def test_ratings_pair_the_best_with_the_worst_and_equal_ones_never(paired: Paired) -> None:
    rows = [
        {"prompt": "p", "response": text, "correctness": 1, "helpfulness": rating}
        for text, rating in (("mid", 2), ("best", 4), ("worst", 0), ("too", 2))
    ]
    found, out = paired(rows)
    assert found == [("p", "best", "worst")] and "(plaintext, by helpfulness)" in out
    assert "left out: 2 rows without a partner" in out
    assert "is no pair" in paired(rows, "--rating_key", "correctness", code=65)[1]


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"prompt": [said("user", "p")], "completion": [said("assistant", text)], "label": label}
            for text, label in (("a", True), ("b", False))
        ],
        [
            {"messages": [said("user", "p"), said("assistant", text)], "label": label}
            for text, label in (("a", True), ("b", False))
        ],
        [
            {"instruction": "p", "input": "", "output": text, "kto_tag": label}
            for text, label in (("a", "true"), ("b", "false"))
        ],
        [{"query": "p", "response": text, "score": rating} for text, rating in (("a", "0.5"), ("b", -1))],
    ],
)
def test_every_layout_of_single_answers_is_paired(paired: Paired, rows: list[dict[str, Any]]) -> None:
    assert paired(rows)[0] == [("p", "a", "b")]


def test_other_system_prompts_and_tools_are_other_prompts(paired: Paired) -> None:
    rows = [
        {"messages": [said("user", "p"), said("assistant", text)], "label": label, "system": system}
        for text, label, system in (("a", True, "s"), ("b", False, "t"), ("c", False, "s"))
    ]
    assert paired(rows)[0] == [("p", "a", "c")]


def test_the_same_answer_is_no_pair_with_itself(paired: Paired) -> None:
    assert "is no pair" in paired([kto("p", "a", True), kto("p", "a", False)], code=65)[1]


def test_bad_rows_are_named_or_counted(paired: Paired) -> None:
    rows = [kto("p", "a", True), kto("p", "b", "maybe"), kto("p", "c", False)]
    assert "in.jsonl:2: label: must be a number, true or false" in paired(rows, code=65)[1]
    found, out = paired(rows, "--bad_rows", "skip")
    assert found == [("p", "a", "c")] and "refused: 1 rows" in out


def test_options_that_cannot_work_are_refused(paired: Paired) -> None:
    assert "--rating_key" in paired([{"prompt": "p", "response": "a"}], code=2)[1]
    assert "messages are written" in paired([kto("p", "a", True)], "--output", "pairs.csv", code=2)[1]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (kto("p", "a", True), "one answer with a label or a rating .*DPO needs pairs.*`data pair FILE"),
        ({"messages": [said("user", "p"), said("assistant", "a")], "label": False}, "`data pair FILE"),
        ({"prompt": "p", "response": "a", "helpfulness": 3}, "`data pair FILE"),
        ({"prompt": "p", "response": "a"}, r"one answer \(plaintext.*--objective sft"),
        ({"instruction": "p", "input": "", "output": "a"}, r"one answer \(alpaca.*--objective sft"),
    ],
)
def test_pairs_of_single_answers_say_what_to_do(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        detect_format(values)
    assert "--dataset_format" not in str(error.value)


@pytest.mark.parametrize("label", [False, 0, 0.0, "False", "false", "0", True, 1])
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_sft_does_not_learn_answers_that_are_labelled_bad(column: str, label: Any) -> None:
    row = {"prompt": "p", "completion": "a", column: label}
    with pytest.raises(UsageError, match="SFT would learn the bad ones"):
        detect_conversation_format(row)
    # also where another row showed the format, or it is named
    with pytest.raises(RowError, match=f"{column}: .*SFT would learn the bad ones"):
        parse_conversation("completion", row, ConversationColumns(), "f:1")
    names = ConversationColumns(ignore_columns=(column,))
    assert parse_conversation("completion", row, names, "f:1").conversation.messages[-1]["content"] == "a"
    assert detect_conversation_format({**row, column: "algebra"}) == "completion"


def test_what_is_written_is_read_as_pairs(paired: Paired, tmp_path: Path) -> None:
    paired([kto("p", "a", True), kto("p", "b", False)])
    reader = PairReader(open_source(str(tmp_path / "out.jsonl")), "auto", ColumnNames())
    (pair,) = reader
    assert reader.dataset_format == "messages" and (pair.chosen, pair.rejected) == ("a", "b")  # type: ignore[union-attr]
