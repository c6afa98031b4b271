"""What a run says about its chat template becomes a part of it, and its date stays that of the first day."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any

import pytest
from data.template_cases import OWN, tokenizer_for

from qlora_dpo.data import template_clock
from qlora_dpo.data.chat import Chat
from qlora_dpo.data.control_tokens import tokenizer_content
from qlora_dpo.data.preferences import Message
from qlora_dpo.data.template_clock import pin_date, pinned_date
from qlora_dpo.data.templates import set_up_chat_template
from qlora_dpo.errors import UsageError

ASKED: list[Message] = [{"role": "user", "content": "q"}]
WITH_SYSTEM: list[Message] = [{"role": "system", "content": "s"}, *ASKED]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prompt_of(tokenizer: Any, messages: list[Message], **kwargs: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs))


def test_template_arguments_become_defaults_that_a_caller_can_overrule(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_for(OWN["closes_thought"])
    set_up_chat_template(tokenizer, chat_template_kwargs={"enable_thinking": False})
    once = tokenizer.chat_template
    set_up_chat_template(tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.chat_template == once
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert prompt_of(saved, ASKED).endswith("<think>\n\n</think>\n\n")
    assert prompt_of(saved, ASKED, enable_thinking=True).endswith("assistant\n")
    assert prompt_of(tokenizer_for(OWN["closes_thought"]), ASKED).endswith("assistant\n")


@pytest.mark.parametrize("value", ["low", 3, None, ["a", "ü"], {"k": True}])
def test_any_json_value_can_be_an_argument(value: Any) -> None:
    tokenizer = tokenizer_for("\n{{ effort | tojson }}|{{ messages[0].content }}")
    set_up_chat_template(tokenizer, chat_template_kwargs={"effort": value})
    import json

    assert json.loads(prompt_of(tokenizer, ASKED).partition("|")[0]) == value
    assert prompt_of(tokenizer, ASKED).startswith("\n")  # the template's own first line break


def test_an_argument_needs_a_name_and_a_json_value() -> None:
    with pytest.raises(UsageError, match=r"'a b' is no name"):
        set_up_chat_template(tokenizer_for(OWN["trims"]), chat_template_kwargs={"a b": 1})
    tokenizer = tokenizer_for(OWN["closes_thought"])
    with pytest.raises(UsageError, match=r"the value of enable_thinking is no JSON value"):
        set_up_chat_template(tokenizer, chat_template_kwargs={"enable_thinking": object()})
    with pytest.raises(UsageError, match=r"reads no argument 'enable_thinkin'; the nearest is enable_thinking"):
        set_up_chat_template(tokenizer, chat_template_kwargs={"enable_thinkin": False})


@pytest.mark.parametrize("name", ["no_system", "drops_system", "trims"])
def test_a_system_prompt_is_folded_into_the_first_question(name: str) -> None:
    tokenizer = tokenizer_for(OWN[name])
    set_up_chat_template(tokenizer, system_prompt="fold")
    together: list[Message] = [{"role": "user", "content": "s\n\nq"}]
    assert prompt_of(tokenizer, WITH_SYSTEM) == prompt_of(tokenizer, together)
    assert prompt_of(tokenizer, ASKED) == prompt_of(tokenizer_for(OWN[name]), ASKED)
    empty: list[Message] = [{"role": "system", "content": ""}, *ASKED]
    assert prompt_of(tokenizer, empty) == prompt_of(tokenizer, ASKED)
    two: list[Message] = [{"role": "system", "content": "r"}, *WITH_SYSTEM]
    assert prompt_of(tokenizer, two) == prompt_of(tokenizer, [{"role": "user", "content": "r\n\ns\n\nq"}])
    longer: list[Message] = [*WITH_SYSTEM, {"role": "assistant", "content": "a"}, *ASKED]
    assert prompt_of(tokenizer, longer) == prompt_of(tokenizer, [*together, *longer[2:]])


def test_a_bos_that_training_writes_is_written_by_the_saved_template(chatml: Any) -> None:
    from tokenizers import processors

    tokenizer = copy.deepcopy(chatml)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    before = Chat(tokenizer).prompt_ids("q")
    assert before != tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    set_up_chat_template(tokenizer)
    once = tokenizer.chat_template
    set_up_chat_template(tokenizer)
    assert tokenizer.chat_template == once
    assert before == Chat(tokenizer).prompt_ids("q")
    assert before == tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]


class Tomorrow(datetime.date):
    @classmethod
    def today(cls) -> Tomorrow:
        return cls(2031, 1, 2)


def test_the_first_day_is_kept(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    first, later = tokenizer_for(OWN["today"]), tokenizer_for(OWN["today"])
    set_up_chat_template(first)
    today = datetime.date.today()
    assert f"Today is {today:%d %b %Y}." in Chat(first).render([ASKED])[0]
    monkeypatch.setattr(template_clock.datetime, "date", Tomorrow)
    set_up_chat_template(later)
    assert Chat(later).prompt_ids("q") == Chat(first).prompt_ids("q")
    assert tokenizer_content(later) == tokenizer_content(first)
    other = tokenizer_for(OWN["today"])
    set_up_chat_template(other, date="2020-02-03")  # that of a run
    assert "03 Feb 2020" in Chat(other).render([ASKED])[0]
    assert tokenizer_content(other) != tokenizer_content(first)
    for record in (cache / "template_dates").iterdir():
        record.write_text("soon")
    set_up_chat_template(other)
    assert pinned_date(other) == "2031-01-02"


def test_a_template_without_a_date_needs_none(cache: Path) -> None:
    tokenizer = tokenizer_for(OWN["trims"])
    set_up_chat_template(tokenizer)
    pin_date(tokenizer, "2020-01-01")
    assert pinned_date(tokenizer) is None and not (cache / "template_dates").exists()
