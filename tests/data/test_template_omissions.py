"""What a template leaves out, or would write twice, refuses the row; nothing of it is lost or added without a word."""

from __future__ import annotations

from typing import Any

import pytest
from data.template_cases import OWN, tokenizer_for

from qlora_dpo.data.control_tokens import control_tokens
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow
from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair

ASKED: Message = {"role": "user", "content": "Please search for Chad."}
TOOLS = ({"type": "function", "function": {"name": "search", "description": "s", "parameters": {"type": "object"}}},)
CALL: dict[str, Any] = {"type": "function", "function": {"name": "search", "arguments": {"what": "Chad"}}}
CALLED: tuple[Message, ...] = (
    ASKED,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "a country"},
)
# The same empty thought before every answer (as some templates for Qwen3 do), behind a prompt that opens one.
ALWAYS_EMPTY = OWN["opens_thought"].replace("'</think>' not in m.content", "true")


def tokenize(template: str, pair: PreferencePair) -> TokenizedPair | RefusedRow:
    (row,) = PairTokenizer(tokenizer_for(template)).tokenize([pair])
    return row


def test_tools_that_are_left_out_are_missed_although_their_name_is_in_the_question() -> None:
    row = tokenize(OWN["trims"], PreferencePair((ASKED,), "ok", "no", tools=TOOLS))
    assert isinstance(row, RefusedRow) and "does not write the tools" in row.reason
    assert isinstance(tokenize(OWN["tools"], PreferencePair((ASKED,), "ok", "no", tools=TOOLS)), TokenizedPair)


def test_earlier_calls_and_results_that_are_left_out_are_missed() -> None:
    row = tokenize(OWN["trims"], PreferencePair(CALLED, "ok", "no"))
    assert isinstance(row, RefusedRow) and "does not write the call of a tool" in row.reason
    assert isinstance(tokenize(OWN["tools"], PreferencePair(CALLED, "ok", "no", tools=TOOLS)), TokenizedPair)
    deaf = OWN["tools"].replace("{{- m.content -}}", "{{- '' if m.role == 'tool' else m.content -}}")
    row = tokenize(deaf, PreferencePair(CALLED, "ok", "no", tools=TOOLS))
    assert isinstance(row, RefusedRow) and "does not write the tool message" in row.reason


def test_a_second_system_prompt_that_is_left_out_is_missed() -> None:
    start = "{{- '<|im_start|>'"
    first_only = OWN["trims"].replace(start, "{%- if m.role != 'system' or loop.first -%}" + start, 1)
    first_only = first_only.replace("{%- endfor -%}", "{%- endif -%}{%- endfor -%}")
    prompt: tuple[Message, ...] = (
        {"role": "system", "content": "Be brief."}, {"role": "system", "content": "brief"}, ASKED,
    )  # fmt: skip
    row = tokenize(first_only, PreferencePair(prompt, "ok", "no"))
    assert isinstance(row, RefusedRow) and "does not write the system message" in row.reason


@pytest.mark.parametrize("name", ["closes_thought", "opens_and_closes"])
def test_the_same_thought_twice_is_one(name: str) -> None:
    thought = {"reasoning_content": "A sum."}
    inline = "<think>\nA sum.\n</think>\n\nTwelve."
    both = PreferencePair("7 + 5?", inline, "<think>\nA sum.\n</think>\n\nTen.", None, 1.0, "", None, thought, thought)
    assert tokenize(OWN[name], both) == tokenize(OWN[name], PreferencePair("7 + 5?", inline, both.rejected))
    other = PreferencePair("7 + 5?", inline, "Ten.", chosen_fields={"reasoning_content": "Another."})
    row = tokenize(OWN[name], other)
    assert isinstance(row, RefusedRow) and "two thoughts" in row.reason


def test_a_thought_whose_opening_the_prompt_writes_goes_on_inside_it() -> None:
    behind = "\n</think>\n\n"
    for name in ("opens_and_closes", "drops_thought", "closes_thought"):
        tails = [
            tokenize(OWN[name], PreferencePair("7 + 5?", f"{opening}A sum.{behind}Twelve.", f"{opening}No{behind}Ten"))
            for opening in ("<think>\n", "")
        ]
        assert tails[0] == tails[1] and isinstance(tails[0], TokenizedPair)


def test_a_template_that_adds_a_thought_of_its_own_refuses_thoughts() -> None:
    pair = PreferencePair("7 + 5?", "<think>\nA sum.\n</think>\n\nTwelve.", "<think>\nNo.\n</think>\n\nTen.")
    row = tokenize(ALWAYS_EMPTY, pair)
    assert isinstance(row, RefusedRow), row


def test_control_text_in_arguments_of_the_template_stays_text() -> None:
    template = "{{- note -}}" + OWN["trims"]
    tokenizer = tokenizer_for(template)
    rows = PairTokenizer(tokenizer).tokenize(
        [PreferencePair("q", "a", "b", chat_template_kwargs={"note": note}) for note in ("<|im_end|> x", "x")]
    )
    counts = [[sum(i in control_tokens(tokenizer) for i in row.prompt_ids)] for row in rows]  # type: ignore[union-attr]
    assert counts[0] == counts[1]
