"""What a run says about its chat template is in its folder, and its date stays that of its first day."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_model, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.data import template_clock
from qlora_dpo.data.chat import Chat
from qlora_dpo.data.template_clock import pinned_date
from qlora_dpo.training.trained_on import load_tokenizer_of, trained_on


def model_with(folder: Path, before: str) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "{{ bos_token }} " + before + " ")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model: Path, pairs: Path, out: Path, steps: int, *more: str) -> int:
    words = ["--model_name_or_path", model, "--dataset", pairs, "--output_dir", out, "--max_steps", steps]
    words += ["--load_in_4bit", "false", "--dtype", "float32", "--lora_r", 4, "--save_steps", 1, "--lint", "warn"]
    return main(["train", *map(str, words), "--gradient_accumulation_steps", "2", *more])


class NextMonth(datetime.date):
    @classmethod
    def today(cls) -> NextMonth:
        return cls(2031, 2, 3)


def test_a_run_keeps_its_date_when_it_continues_later(
    tmp_path: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with(tmp_path / "model", "{{ strftime_now('w1%m') }}")
    out = tmp_path / "run"
    assert train(model, pairs_file, out, 1) == 0
    today = datetime.date.today()
    assert json.loads((out / "run.json").read_text())["chat_template_date"] == today.isoformat()
    monkeypatch.setattr(template_clock.datetime, "date", NextMonth)
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "empty"))  # nothing but the folder knows the day
    assert train(model, pairs_file, out, 2, "--allow_changed", "max_steps") == 0
    tokenizer = load_tokenizer_of(out, trained_on(out))
    assert pinned_date(tokenizer) == today.isoformat()
    assert int(f"1{today:%m}") in Chat(tokenizer).prompt_ids("w7")
    assert train(model, pairs_file, tmp_path / "other", 1) == 0
    assert json.loads((tmp_path / "other/run.json").read_text())["chat_template_date"] == "2031-02-03"


def test_template_arguments_are_in_the_folder_and_in_its_template(
    tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    model, out = model_with(tmp_path / "model", "{{ word }}"), tmp_path / "run"
    options = ("--chat_template_kwargs", '{"word": "w99"}', "--system_prompt", "fold")
    assert train(model, pairs_file, out, 1, *options) == 0
    settings: dict[str, Any] = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["chat_template_kwargs"], settings["system_prompt"]) == ({"word": "w99"}, "fold")
    saved = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "system", "content": "w7"}, {"role": "user", "content": "w8"}]
    text = saved.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.split() == ["<s>", "w99", "w7", "w8", "w5"]
    assert train(model, pairs_file, out, 1, "--chat_template_kwargs", '{"word": "w98"}', *options[2:]) == 2
    assert "chat_template_kwargs: was {'word': 'w99'}, now {'word': 'w98'}" in capsys.readouterr().err
