"""No column is dropped in silence: content is used or refused in every format, what nobody reads is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_formats import message, said

from qlora_dpo.cli import main
from qlora_dpo.config.data import PairFileOptions
from qlora_dpo.data.columns import CONTENT, JOINED
from qlora_dpo.data.conversations import (
    CONVERSATION_FORMATS,
    Conversation,
    ConversationColumns,
    conversation_columns_read,
    detect_conversation_format,
    parse_conversation,
)
from qlora_dpo.data.dataset import load_conversation_dataset, load_preference_dataset
from qlora_dpo.data.formats import FORMATS, ColumnNames, columns_read, detect_format, parse_row
from qlora_dpo.data.mixtures.mix import reader_of as mixture_reader
from qlora_dpo.data.mixtures.mixture import read_mixture
from qlora_dpo.data.pair_reader import reader_of
from qlora_dpo.data.preferences import PreferencePair, RowError

USER, SYSTEM = message("q", "user"), message("s", "system")
NAMES = ColumnNames()
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def pair_of(values: dict[str, Any], names: ColumnNames = NAMES) -> PreferencePair:
    return parse_row(detect_format(values, names), values, names, "f:1").pair


def conversation_of(values: dict[str, Any], **names: Any) -> Conversation:
    columns = ConversationColumns(**names)
    return parse_conversation(detect_conversation_format(values, columns), values, columns, "f:1").conversation


def reason_of(read: Callable[[], object]) -> str:
    with pytest.raises(RowError) as error:
        read()
    return str(error.value)


class Watched(dict[str, Any]):
    """A row that notes which of its columns are read."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_which_columns_it_reads(name: str) -> None:
    row = Watched(FORMATS[name].EXAMPLE)
    FORMATS[name].parse(row, NAMES)
    assert row.read & row.keys() <= set(FORMATS[name].reads(NAMES))
    assert set(FORMATS[name].reads(NAMES)) <= columns_read(name, NAMES) <= columns_read("auto", NAMES)


@pytest.mark.parametrize("name", FORMATS)
def test_the_system_prompt_and_tools_are_used_in_every_format(name: str) -> None:
    example = {key: value for key, value in FORMATS[name].EXAMPLE.items() if key != "system"}
    pair = parse_row(name, {**example, "system": "Be short.", "tools": [TOOL]}, NAMES, "").pair
    system, *turns = pair.messages
    assert system == {"role": "system", "content": "Be short."}
    assert turns == [turn for turn in parse_row(name, example, NAMES, "").pair.messages if turn["role"] != "system"]
    assert pair.tools == (TOOL,)


@pytest.mark.parametrize("column", ["image", "images", "videos", "audio", "documents"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_no_template_gets_is_refused_in_every_format(name: str, column: str) -> None:
    example = FORMATS[name].EXAMPLE
    reason = reason_of(lambda: parse_row(name, {**example, column: ["x"]}, NAMES, ""))
    assert reason == f"{column}: answers that need {column} are not supported (--ignore_columns {column} leaves it out)"
    ignoring = ColumnNames(ignore_columns=(column,))
    assert parse_row(name, {**example, column: ["x"]}, ignoring, "") == parse_row(name, example, NAMES, "")
    for empty in (None, "", [], {}, "[]"):
        assert parse_row(name, {**example, column: empty}, NAMES, "") == parse_row(name, example, NAMES, "")


PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}
TALK = [message("x", "user"), message("y")]


@pytest.mark.parametrize(
    ("more", "prompt"),
    [
        ({"system": "s"}, [SYSTEM, USER]),
        ({"system_prompt": "s"}, [SYSTEM, USER]),
        ({"system": " "}, [USER]),
        ({"input": "i"}, [message("q\ni", "user")]),
        ({"context": "c", "input": "i"}, [message("q\ni\nc", "user")]),
        ({"context": "q"}, [USER]),
        ({"history": [["x", "y"]], "system": "s"}, [SYSTEM, *TALK, USER]),
        ({"history": TALK}, [*TALK, USER]),
        ({"context": [SYSTEM, *TALK, USER]}, [SYSTEM, *TALK, USER]),
        ({"instruction": "q"}, [USER]),
    ],
)
def test_content_beside_a_prompt_becomes_a_part_of_it(more: dict[str, Any], prompt: list[Any]) -> None:
    assert list(pair_of({**PLAIN, **more}).messages) == prompt
    assert list(pair_of({**PLAIN, "prompt": [USER], **more}).messages) == prompt
    conversation = conversation_of({"prompt": "q", "response": "a", **more})
    assert list(conversation.messages) == [*prompt, message("a")]
    conversation = conversation_of({"messages": [USER, message("a")], **more})
    assert list(conversation.messages) == [*prompt, message("a")]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"system": 3}, "system: must be text (it is number)"),
        (
            {"system": "other"},
            "system: another system prompt than that of the first turn (--ignore",
        ),
        ({"input": "i"}, "input: has no place beside a prompt of several turns (--ignore_columns input leaves it out)"),
        ({"context": {"a": 1}}, "context: must be a list of pairs of texts (it is object)"),
        ({"history": "text"}, "history: must be a list of pairs of texts (it is text)"),
        ({"instruction": "i"}, "instruction: holds a text that is not in the prompt (--ignore_columns instruction"),
        ({"tools": [3]}, "tools[0]: must be an object, or the JSON text of it"),
        ({"tools": float("nan")}, "tools: must be a list of objects, or the JSON text of it"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: must be an object, or the JSON text of it"),
    ],
)
def test_content_without_a_place_is_refused(more: dict[str, Any], reason: str) -> None:
    turns = [SYSTEM, *TALK, USER]
    assert reason_of(lambda: pair_of({**PLAIN, "prompt": turns, **more})).startswith(reason)
    assert reason_of(lambda: conversation_of({"messages": [*turns, message("a")], **more})).startswith(reason)


def test_what_was_joined_is_counted() -> None:
    parsed = parse_row("plaintext", {**PLAIN, "context": "c", "system": "s"}, NAMES, "")
    assert parsed.repairs == (JOINED.format(column="context"),)


@pytest.mark.parametrize("form", [lambda value: value, json.dumps])
def test_tools_and_template_arguments_are_carried(form: Callable[[Any], Any]) -> None:
    more = {"tools": form([TOOL]), "chat_template_kwargs": form({"enable_thinking": False})}
    pair = pair_of({**PLAIN, **more})
    conversation = conversation_of({"messages": [USER, message("a")], **more})
    for held in (pair, conversation):
        assert held.tools == (TOOL,) and held.chat_template_kwargs == {"enable_thinking": False}
    assert pair_of({**PLAIN, "functions": [TOOL["function"]]}).tools == (TOOL,)


def test_sft_rows_of_other_layouts_keep_their_columns() -> None:
    alpaca = {"instruction": "Count.", "input": "ocean", "output": "Three."}
    assert conversation_of(alpaca, prompt="instruction", response="output").messages[0]["content"] == "Count.\nocean"
    sharegpt = {"conversations": [said("q", "human"), said("a")], "system": "s"}
    assert list(conversation_of(sharegpt, messages="conversations").messages) == [SYSTEM, USER, message("a")]


def test_category_and_confidence_can_be_named_or_ignored() -> None:
    row = {**PLAIN, "category": 3, "confidence": 4, "topic": "math", "sure": "0.75"}
    assert "--category_key names another column" in reason_of(lambda: pair_of(row))
    assert "--confidence_key" in reason_of(lambda: pair_of({**row, "category": "c"}))
    pair = pair_of(row, ColumnNames(category="topic", confidence="sure"))
    assert (pair.category, pair.confidence) == ("math", 0.75)
    pair = pair_of(row, ColumnNames(category="", confidence=""))
    assert (pair.category, pair.confidence) == (None, 1.0)
    assert "--category_key" in reason_of(lambda: conversation_of({"prompt": "q", "response": "a", "category": [1]}))
    assert conversation_of({"prompt": "q", "response": "a", "category": [1]}, category="").category is None


ROW = {"id": 7, **PLAIN, "score": float("nan"), "category": "c", "tools": None}


def test_columns_that_nobody_reads_are_named_once(
    write_jsonl: Callable[..., str], chatml: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl([ROW, ROW, {**PLAIN, "source": "x", "rejected": "c"}])
    report = load_preference_dataset(path, tokenizer=chatml, cache_dir=tmp_path, ignore_columns=["category"]).report
    assert report.unread_columns == ("id", "score", "category", "source")
    assert report.summary().count("not read: id, score, category, source") == 1
    again = load_preference_dataset(path, tokenizer=chatml, cache_dir=tmp_path, ignore_columns=["category"]).report
    assert again.from_cache and again.unread_columns == report.unread_columns
    for command in (
        ["inspect", path],
        ["lint", path],
        ["convert", path, "--to", "alpaca", "--output", str(tmp_path / "out.jsonl")],
    ):
        main(["data", *command])
        assert capsys.readouterr().out.count("not read: id, score, source") == 1, command


def test_columns_of_conversations_that_nobody_reads_are_named(write_jsonl: Any, chatml: Any, tmp_path: Path) -> None:
    path = write_jsonl([{"messages": [USER, message("a")], "prompt": "q", "source": "x"}])
    report = load_conversation_dataset(path, tokenizer=chatml, cache_dir=tmp_path).report
    assert report.unread_columns == ("prompt", "source")
    for name in CONVERSATION_FORMATS:
        assert conversation_columns_read(name, ConversationColumns()) >= {"category"}


def test_a_mixture_names_columns_of_each_source(write_jsonl: Any, tmp_path: Path) -> None:
    path = write_jsonl([{**PLAIN, "category": 3, "kind": "math", "confidence": 5, "images": ["x"]}])
    text = f"sources: [{{path: {path}, category_key: kind, confidence_key: '', ignore_columns: [images]}}]"
    (tmp_path / "mix.yaml").write_text(text)
    (pair,) = mixture_reader(read_mixture(tmp_path / "mix.yaml").sources[0])
    assert isinstance(pair, PreferencePair) and (pair.category, pair.confidence) == ("math", 1.0)


def test_options_reach_the_reader(write_jsonl: Any) -> None:
    path = write_jsonl([{**PLAIN, "category": 3, "confidence": 5, "images": ["x"]}])
    options: dict[str, Any] = {"category_key": "", "confidence_key": "", "ignore_columns": ("images",)}
    reader = reader_of(PairFileOptions(path, **options))
    assert all(isinstance(pair, PreferencePair) for pair in reader)
    assert reader.unread.names == ("category", "confidence", "images")


def test_content_columns_are_read_beside_those_of_a_format() -> None:
    assert "system" in CONTENT and "system" not in columns_read("plaintext", NAMES)
