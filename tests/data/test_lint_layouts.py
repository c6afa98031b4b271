"""`data lint` finds rows whose columns were read as something else than they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from lint_rows import good_rows, lint_texts, lint_tokens

from qlora_dpo.data.completions import OPEN_THOUGHT
from qlora_dpo.data.linting.rows import refused_rows
from qlora_dpo.data.linting.texts import TEXT_RULES, find_marks
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow

QUESTION = "Which river runs through Vienna?"
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "The Danube."}]
SHAREGPT = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "The Danube."}]


def names(pair: PreferencePair) -> set[str]:
    return {rule.name for rule in TEXT_RULES if rule.check(pair, find_marks()) is not None}


def pair(
    prompt: str | tuple[Message, ...] = QUESTION, chosen: str = "The Danube.", rejected: str = "The Rhine."
) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("prompt", "is_found"),
    [
        ("\n\nHuman: Name a river.\n\nAssistant: A big one?\n\nHuman: Yes.\n\nAssistant:", True),
        ("Human: Name a river.\nAssistant:", True),
        ("Be kind.\nUSER: Name a river. ASSISTANT:", True),
        ("用户：你好\n助手：", True),
        ("User：你好\nAssistant：", True),
        ("Below is an instruction.\n\n### Instruction:\nName a river.\n\n### Response:\n", True),
        ("[INST] Name a river. [/INST]", True),
        ("<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n", True),
        ("<start_of_turn>user\nName a river.<end_of_turn>\n<start_of_turn>model\n", True),
        ("<|user|>\nName a river.\n<|assistant|>\n", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nName a river.<|eot_id|>", True),
        ("A user: who is that? Ask the assistant: it knows.", False),
        ("What does <|im_start|> mean? And [INST]?", False),
        ("Human: a history of mankind. Write its preface.", False),
        ("### Instruction manuals\nSummarize them.", False),
    ],
)
def test_a_dialogue_in_the_text_of_a_prompt_is_found(prompt: str, is_found: bool) -> None:
    assert ("dialogue_in_prompt" in names(pair(prompt))) == is_found
    asked: Message = {"role": "user", "content": prompt}
    assert ("dialogue_in_prompt" in names(pair((asked,)))) == is_found
    if is_found:
        assert "control_text" not in names(pair(prompt))  # it is said once


def test_a_system_prompt_may_show_a_dialogue() -> None:
    shown: Message = {"role": "system", "content": "Answer like this.\nUser: Hi\nAssistant: Hello"}
    assert "dialogue_in_prompt" not in names(pair((shown, {"role": "user", "content": QUESTION})))


@pytest.mark.parametrize("messages", [MESSAGES, SHAREGPT, MESSAGES[0]])
@pytest.mark.parametrize("written", [json.dumps, repr, lambda value: f"array({value}, dtype=object)"])
def test_messages_that_were_saved_as_text_are_found(messages: Any, written: Callable[[Any], str]) -> None:
    text = written(messages)
    assert names(pair(chosen=text)) == names(pair(rejected=f"\n{text} ")) == names(pair(text)) == {"messages_as_text"}


@pytest.mark.parametrize(
    "answer",
    [
        '{"content": "The Danube."}',
        '{"from": "EUR", "to": "USD", "value": 3}',
        '[{"role": "engineer", "content": 1}]',
        'Send this:\n[{"role": "user", "content": "Hi"}]',
        '[{"role": "user", "content": "Hi"}] is a list of messages.',
        "[1] See above.",
    ],
)
def test_other_answers_in_json_are_no_messages(answer: str) -> None:
    assert names(pair(chosen=answer)) == set()


@pytest.mark.parametrize(
    ("chosen", "rejected", "is_found"),
    [
        (f"{QUESTION} The Danube.", f" {QUESTION}\nThe Rhine.", True),
        (f"{QUESTION} The Danube.", "The Rhine.", False),
        ("The Danube.", f"{QUESTION} The Rhine.", False),
    ],
)
def test_answers_that_begin_with_their_prompt_are_found(chosen: str, rejected: str, is_found: bool) -> None:
    asked: tuple[Message, ...] = (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": f"{QUESTION}\n"},
    )
    for prompt in (QUESTION, asked):
        assert ("answer_repeats_prompt" in names(pair(prompt, chosen, rejected))) == is_found


def test_answers_may_begin_with_a_short_prompt() -> None:
    assert names(pair("1 + 1 =", "1 + 1 = 2", "1 + 1 = 3")) == set()


@pytest.mark.parametrize(
    ("answer", "is_open"),
    [
        ("<think>\nVienna lies", True),
        ("<think>\nVienna lies</think>\nThe Danube.", False),
        ("<think>a</think>b\n<think>c", True),
        ("[THINK]Vienna lies", True),
        ("The <think> tag opens a thought.", False),
    ],
)
def test_answers_that_end_within_a_thought_are_found(answer: str, is_open: bool) -> None:
    assert names(pair(chosen=answer)) == ({"open_thought"} if is_open else set())
    assert names(pair(rejected=answer)) == ({"open_thought_rejected"} if is_open else set())


@pytest.mark.parametrize(
    ("change", "rule", "blocks_from"),
    [
        (lambda text: {"prompt": f"Human: {text}\nAssistant:"}, "dialogue_in_prompt", 2),
        (lambda text: {"chosen": f"{{'role': 'assistant', 'content': {text}}}"}, "messages_as_text", 2),
        (lambda text: {"chosen": f"<think>{text}"}, "open_thought", 2),
        (lambda text: {key: f"{text} {key}" for key in ("chosen", "rejected")}, "answer_repeats_prompt", 51),
    ],
)
def test_a_share_of_such_rows_blocks(
    change: Callable[[str], dict[str, str]], rule: str, blocks_from: int, write_jsonl: Callable[..., str]
) -> None:
    rows = good_rows(100)
    for number, blocks in ((blocks_from - 1, False), (blocks_from, True)):
        changed = [each | change(each["prompt"]) for each in rows[-number:]]
        report = lint_texts(write_jsonl([*rows[:-number], *changed]))
        assert (report.counts[rule], report.blocking()) == (number, [rule] if blocks else []), report.lines(2)


def test_columns_that_nothing_reads_are_named(write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = good_rows(5)
    rows[3] |= {"score": 0.5, "source": "web"}
    path = write_jsonl(rows)
    for report in (lint_texts(path), lint_tokens(chatml, path)):
        assert [str(finding) for finding in report.rows["unread_columns"]] == [
            f"{path}: unread_columns: not read: score, source"
        ]
        assert not report.blocking()
    assert not lint_texts(write_jsonl(good_rows(5))).counts


def test_an_answer_within_the_thought_that_the_template_opens_counts_as_one() -> None:
    row = RefusedRow("pairs.jsonl:1", "chosen", f"{OPEN_THOUGHT}; try something")
    for bad_rows, rule in (("fail", "open_thought"), ("skip", "skipped_row")):
        assert [finding.rule for finding in refused_rows([row], bad_rows)] == [rule]  # type: ignore[arg-type]
