"""One law for every template: prompt and completion are the template's own rendering, or the row is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from data.template_cases import CASES, OWN, Case, shared_templates, template, tokenizer_for

from qlora_dpo.data.chat import Chat
from qlora_dpo.data.chat_context import ChatContext
from qlora_dpo.data.control_tokens import control_tokens
from qlora_dpo.data.conversation_tokens import ConversationTokenizer, TokenizedConversation
from qlora_dpo.data.conversations import Conversation
from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow
from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair
from qlora_dpo.errors import DataError, UsageError

NAMES = [*(name for name in OWN if name != "parts_only"), *shared_templates()]
tokenizer_of = cache(lambda name: tokenizer_for(template(name)))

# What a template cannot write, by the reason that is given; everything else is trained on.
_OPEN, _OTHER, _NO_THOUGHT = "would end inside the thought", "behind its own generation prompt", "answer's thought"
_PLAIN = ("plain", "system", "plain_turns", "white_space", "line_first", "chinese")
_THOUGHTS = ("inline_thought", "tight_thought", "reasoning_content", "turns")
_NO_SYSTEM = {"system": "--system_prompt fold"}
_UNKNOWN_TO = ("two_ends", "eos_last", "trims", "no_system", "drops_system", "today", "no_generation_prompt",
               "always_asks", "tools", "cohere", "gemma", "gemma3", "lfm2", "llama3", "llama3_1", "phi3", "qwen2_5",
               "qwen3_instruct_2507")  # fmt: skip
REFUSED: dict[str, dict[str, str]] = {name: {"reasoning_content": _NO_THOUGHT} for name in _UNKNOWN_TO}
for name in ("no_system", "drops_system", "gemma"):
    REFUSED[name] = REFUSED[name] | _NO_SYSTEM
REFUSED |= {
    "opens_thought": dict.fromkeys((*_PLAIN, "no_thinking"), _OPEN) | {"tight_thought": _OTHER},
    "drops_thought": dict.fromkeys((*_PLAIN, "no_thinking"), _OPEN),
    "deepseekv3": dict.fromkeys((*_PLAIN, "no_thinking"), _OPEN),
    "nemotron_3_nano": dict.fromkeys(_PLAIN, _OPEN),
    "qwen3_5_nothink": dict.fromkeys(_THOUGHTS, _OTHER),
}
# The conversation that a template renders drops the thought, which the model yet writes behind its generation prompt.
DROPS = {"drops_thought", "deepseekv3"}


def pair_of(case: Case) -> PreferencePair:
    fields = {key: value for key, value in case.answer.items() if key not in ("role", "content")}
    answer = case.answer["content"]
    return PreferencePair(
        tuple(case.messages), answer, answer.replace("Twelve", "Eleven") + " No.", origin="f:1", chosen_fields=fields,
        rejected_fields=fields, chat_template_kwargs=case.kwargs,
    )  # fmt: skip


def rendered(tokenizer: Any, case: Case) -> tuple[str, str]:
    """The template's own prompt, and its own conversation up to the last control token before a next turn."""
    answer = dict(case.answer)
    if "reasoning_content" in answer:
        answer["thinking"] = answer["reasoning_content"]
        if not re.search("m.reasoning_content|message.reasoning_content|thinking", tokenizer.chat_template):
            answer["content"] = f"<think>\n{answer['thinking']}\n</think>\n\n{answer['content']}"
    prompt = tokenizer.apply_chat_template(case.messages, tokenize=False, add_generation_prompt=True, **case.kwargs)
    whole = tokenizer.apply_chat_template([*case.messages, answer], tokenize=False, **case.kwargs)
    if "else -%}{{- eos_token" in tokenizer.chat_template or "{% else %}{{ eos_token }}" in tokenizer.chat_template:
        whole = whole.removesuffix(tokenizer.eos_token)
    if "'<|start|><|assistant|>'" in tokenizer.chat_template:
        whole = whole.removesuffix("<|start|><|assistant|>")
    names = [re.escape(token.content) for token in control_tokens(tokenizer).values()]
    end = [match.end() for match in re.finditer("|".join(names), whole)][-1]
    return prompt, whole[:end]


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_the_template_or_the_row_is_refused(name: str, kind: str) -> None:
    tokenizer, case = tokenizer_of(name), CASES[kind]
    tokens = PairTokenizer(tokenizer)
    (row,) = tokens.tokenize([pair_of(case)])
    reason = REFUSED.get(name, {}).get(kind)
    if reason is not None:
        assert isinstance(row, RefusedRow) and reason in row.reason, row
        return
    assert isinstance(row, TokenizedPair), row
    ids = row.prompt_ids + row.chosen_ids
    assert all(part in tokenizer.decode(row.chosen_ids) for part in case.must_hold)
    prompt, whole = rendered(tokenizer, case)
    if name in DROPS and kind in _THOUGHTS:
        assert tokenizer.decode(ids) == prompt + tokenizer.decode(row.chosen_ids)
    elif "</think>" not in case.answer["content"] or whole.startswith(prompt):
        assert tokenizer.decode(ids) == whole
        together = tokenizer(whole, add_special_tokens=False).input_ids
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert row.prompt_ids == prompt_ids
        if together[: len(prompt_ids)] == prompt_ids:  # no token reaches across the border
            assert ids == together
    assert row.prompt_ids == tokens.render_prompt_ids(case.messages, ChatContext(kwargs=case.kwargs))


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_has_the_ids_of_its_pair(name: str, kind: str) -> None:
    tokenizer, case = tokenizer_of(name), CASES[kind]
    (pair,) = PairTokenizer(tokenizer).tokenize([pair_of(case)])
    conversation = Conversation((*case.messages, case.answer), origin="f:1", chat_template_kwargs=case.kwargs)
    (row,) = ConversationTokenizer(tokenizer).tokenize([conversation])
    if isinstance(pair, RefusedRow):
        assert isinstance(row, RefusedRow) and row.reason == pair.reason
        return
    assert isinstance(row, TokenizedConversation), row
    assert row.ids == pair.prompt_ids + pair.chosen_ids
    assert row.spans[-1] == (len(pair.prompt_ids), len(row.ids))
    for start, end in row.spans[:-1]:  # an earlier turn is what is written behind its own prompt
        assert row.ids[start:end][-1] in control_tokens(tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_control_text_in_an_answer_stays_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    names = [token.content for token in control_tokens(tokenizer).values()]
    thought = "<think>\nHm.\n</think>\n\n" if "inline_thought" not in REFUSED.get(name, {}) else ""
    pair = PreferencePair("Hello", f"{thought}a {' '.join(names)} b", f"{thought}c", origin="f:1")
    plain = PreferencePair("Hello", f"{thought}a b", f"{thought}c", origin="f:1")
    row, other = PairTokenizer(tokenizer).tokenize([pair, plain])
    assert isinstance(row, TokenizedPair) and isinstance(other, TokenizedPair)
    known = set(control_tokens(tokenizer))
    assert [i for i in row.chosen_ids if i in known] == [i for i in other.chosen_ids if i in known]
    assert " ".join(names) in tokenizer.decode(row.chosen_ids)


def test_two_control_tokens_end_an_answer() -> None:
    tokenizer = tokenizer_of("two_ends")
    (row,) = PairTokenizer(tokenizer).tokenize([PreferencePair("q", "a", "b")])
    assert isinstance(row, TokenizedPair)
    assert tokenizer.convert_ids_to_tokens(row.chosen_ids)[-2:] == ["<|said|>", "<|im_end|>"]
    assert Chat(tokenizer).form.end_id == row.chosen_ids[-1]


def test_tags_of_thoughts_may_be_control_tokens() -> None:
    tokenizer = tokenizer_for(OWN["closes_thought"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    answer = "<think>\nTwo </think> of them?\n</think>\n\nyes </think>"
    (row,) = PairTokenizer(tokenizer).tokenize([PreferencePair("a <think>", answer, "<think>x</think>no")])
    assert isinstance(row, TokenizedPair)
    tags = [tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>")]
    assert [row.chosen_ids.count(tag) for tag in tags] == [1, 1]
    assert row.prompt_ids.count(tags[0]) == 0


def test_a_template_that_ignores_its_text_is_refused_by_name() -> None:
    tokenizer = tokenizer_for(OWN["parts_only"])
    tokenizer.name_or_path = "org/sees"
    with pytest.raises(UsageError, match=r"template of org/sees does not write the question .*list of parts"):
        PairTokenizer(tokenizer)


TOOLS = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},)
CALL: dict[str, Any] = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 7}}}]}


@pytest.mark.parametrize("name", ["tools", "qwen3", "qwen2_5", "llama3_1", "gptoss", "deepseekv3", "trims", "gemma"])
def test_tools_are_written_by_the_template_or_refused(name: str) -> None:
    if name not in NAMES:
        pytest.skip("no chat templates in ../shared/data")
    tokenizer = tokenizer_of(name)
    pair = PreferencePair("What is 7 + 5?", "", "Hm", origin="f:1", chosen_fields=CALL, tools=TOOLS)
    (row,) = PairTokenizer(tokenizer).tokenize([pair])
    if name in ("trims", "gemma", "deepseekv3"):
        assert isinstance(row, RefusedRow) and "does not write the tools" in str(row)
        return
    assert isinstance(row, TokenizedPair), row
    asked: list[Message] = [{"role": "user", "content": "What is 7 + 5?"}]
    whole = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": "", **CALL}], tools=list(TOOLS), tokenize=False
    )
    text = tokenizer.decode(row.prompt_ids + row.chosen_ids)
    assert whole.startswith(text) and not whole[len(text) :].strip()
    assert "add" in tokenizer.decode(row.chosen_ids) and row.chosen_ids[-1] in control_tokens(tokenizer)


@pytest.mark.parametrize(("good", "stops"), [(99, True), (100, False)])
def test_many_answers_inside_an_open_thought_stop_even_a_run_that_skips(
    good: int, stops: bool, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    tokenizer = tokenizer_of("opens_thought")
    thought = "<think>\nHm.\n</think>\n\n"
    rows = [{"prompt": f"q{n}", "chosen": f"{thought}{n}", "rejected": f"{thought}no"} for n in range(good)]
    path = write_jsonl([*rows, {"prompt": "q", "chosen": "plain", "rejected": f"{thought}no"}])
    options: dict[str, Any] = {"tokenizer": tokenizer, "cache_dir": tmp_path / "cache", "bad_rows": "skip"}
    if stops:
        with pytest.raises(DataError, match=r"1 of 100 rows .*(\n.*)*enable_thinking"):
            load_preference_dataset(path, **options)
    else:
        assert len(load_preference_dataset(path, **options)) == good
