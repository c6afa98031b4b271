"""What stands beside a prompt that other formats know as content: dialogues, thoughts, earlier turns; arena votes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_columns import PLAIN, SYSTEM, TALK, TOOL, USER, conversation_of, pair_of, reason_of
from test_formats import message

from qlora_dpo.data.conversations import ConversationColumns, parse_conversation
from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.files.writers import row_writer
from qlora_dpo.data.formats import ColumnNames, all_columns, detect_format, parse_row, write_row
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import NoPreferenceError, PreferencePair
from qlora_dpo.data.prompts import read_prompt

A = message("a")
EARLIER = [SYSTEM, *TALK]
SFT = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_dialogue_beside_a_prompt_is_read_or_refused(column: str, as_text: bool) -> None:
    def beside(*turns: Any) -> dict[str, Any]:
        return {column: json.dumps(turns) if as_text else list(turns)}

    for turns in ([*EARLIER, USER], [*EARLIER, USER, message("x")]):
        assert list(pair_of({**PLAIN, **beside(*turns)}).messages) == [*EARLIER, USER]
    assert pair_of({**PLAIN, **beside(USER)}).messages == pair_of(PLAIN).messages
    longer = {"prompt": [*EARLIER, USER], "chosen": [A], "rejected": [message("b")]}
    assert list(pair_of({**longer, **beside(*TALK)}).messages) == [*EARLIER, USER]
    for turns in ([USER, A, message("r", "user")], [message("r", "user")]):
        assert column in reason_of(lambda turns=turns: pair_of({**PLAIN, **beside(*turns)}))
    names = ColumnNames(ignore_columns=(column,))
    assert pair_of({**PLAIN, **beside(message("r", "user"))}, names).messages == pair_of(PLAIN).messages


def test_a_dialogue_beside_an_answer_to_learn_holds_that_answer() -> None:
    row = {"instruction": "q", "output": "a"}
    assert list(conversation_of({**row, "messages": None}).messages) == [USER, A]
    whole = {**row, "conversations": repr([*EARLIER, USER, A])}
    assert list(parse_alpaca(whole)) == [*EARLIER, USER, A]
    assert "conversations" in reason_of(lambda: parse_alpaca({**row, "conversations": repr([USER, message("c")])}))


def parse_alpaca(row: dict[str, Any]) -> tuple[Any, ...]:
    return parse_conversation("alpaca", row, ConversationColumns(), "f:1").conversation.messages


def test_a_prompt_to_answer_may_begin_a_dialogue() -> None:
    assert read_prompt({"prompt": "q", "messages": [USER, A, message("r", "user")]}, "prompt") == "q"
    assert read_prompt({"prompt": "q", "messages": [*EARLIER, USER, A]}, "prompt") == (*EARLIER, USER)


def test_the_column_of_a_thought_belongs_to_the_answer() -> None:
    thought = {"reasoning_content": "hm"}
    assert list(conversation_of({**SFT, **thought}).messages) == [USER, {**A, **thought}]
    inline = {"prompt": "q", "completion": "<think>hm</think>a", **thought}
    assert conversation_of(inline).messages[1] == message("<think>hm</think>a")
    assert "belongs to neither" in reason_of(lambda: pair_of({**PLAIN, **thought}))


def test_earlier_turns_are_read_from_text() -> None:
    for text in ("[['a', 'b']]", '[["a", "b"]]', "[('a', 'b')]"):
        assert pair_of({**PLAIN, "history": text}) == pair_of({**PLAIN, "history": [["a", "b"]]})


def test_nulls_in_schemas_are_arrows_and_those_in_json_text_are_the_users(tmp_path: Path) -> None:
    tool = {**TOOL, "function": {**TOOL["function"], "description": None, "strict": None}}  # type: ignore[dict-item]
    assert pair_of({**PLAIN, "tools": [tool]}).tools == (TOOL,)
    pair = pair_of({**PLAIN, "tools": json.dumps([tool])})
    assert pair.tools == (tool,) and pair_of(write_row("messages", pair)).tools == (tool,)
    with row_writer(tmp_path / "pairs.parquet", all_columns("messages")) as add:
        add(write_row("messages", pair))
    (read,) = PairReader(open_source(str(tmp_path / "pairs.parquet")), "auto", ColumnNames())
    assert isinstance(read, PreferencePair) and read.tools == (tool,)


VOTE: dict[str, Any] = {"prompt": "q", "response_a": "a", "response_b": "b"}


def vote(winner: str, number: Any = 1, **more: Any) -> dict[str, Any]:
    zero = type(number)(0) if not isinstance(number, str) else "0"
    winners = {f"winner_{name}": number if name == winner else zero for name in ("model_a", "model_b", "tie")}
    return {**VOTE, **winners, **more}


@pytest.mark.parametrize("number", [1, True, "1", 1.0])
def test_kaggles_votes_are_read(number: Any) -> None:
    turns = {"prompt": ["p", "q"], "response_a": ["x", "a"], "response_b": ["x", "b"]}
    for winner, answers in (("model_a", ("a", "b")), ("model_b", ("b", "a"))):
        pair = pair_of(vote(winner, number))
        assert (list(pair.messages), pair.chosen, pair.rejected) == ([USER], *answers)
        before = [message("p", "user"), message("x"), USER]
        for more in (turns, {column: json.dumps(texts) for column, texts in turns.items()}):
            pair = pair_of(vote(winner, number, **more))
            assert (list(pair.messages), pair.chosen, pair.rejected) == (before, *answers)
    with pytest.raises(NoPreferenceError, match="a tie"):
        pair_of(vote("tie", number))
    with pytest.raises(NoPreferenceError, match="no common prompt"):
        pair_of(vote("model_a", number, **{**turns, "response_b": ["y", "b"]}))
    assert "is empty" in reason_of(lambda: pair_of(vote("model_a", number, response_a="[null]")))
    assert "as many turns" in reason_of(lambda: pair_of(vote("model_a", number, response_a=json.dumps(["a", "b"]))))


@pytest.mark.parametrize("turn", [1, "1", 1.0])
def test_a_vote_about_the_first_turn_compares_the_first_answers(turn: Any) -> None:
    def talk(*answers: str) -> list[Any]:
        return [turn for text in answers for turn in (USER, message(text))]

    row = {"conversation_a": talk("a", "c"), "conversation_b": talk("b", "d"), "winner": "model_a"}
    pair = parse_row(detect_format({**row, "turn": turn}), {**row, "turn": turn}, ColumnNames(), "f:1").pair
    assert (list(pair.messages), pair.chosen, pair.rejected) == ([USER], "a", "b")
    assert "turn: must be a number from 1 to 2" in reason_of(lambda: pair_of({**row, "turn": 3}))
