"""The prompts that a check replays: a file's, those of the pairs that the run held out, or a short built-in list."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.chat import Chat
from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.data.files.sources import read_rows
from qlora_dpo.data.formats import detect_format, parse_row
from qlora_dpo.data.linting.lint import kept_texts, tokenized_source
from qlora_dpo.data.preferences import ColumnNames, Message, NoPreferenceError, RefusedRow, RowError
from qlora_dpo.data.prompts import prompt_of, read_prompt
from qlora_dpo.errors import DataError, StorageError
from qlora_dpo.release.artefact import Artefact
from qlora_dpo.training.data import load_training_data

Prompt = str | Sequence[Message]

BUILT_IN = (
    "Hello!", "What is the capital of France?", "How much is 17 plus 25?", "Name three colors.",
    "Write a haiku about rain.", "  Why is the sky blue?", "Translate to German: Good morning, how are you?",
    "用一句话解释什么是重力。", "法国的首都是哪座城市？", "请写出三种水果的名称。", "¿Cuántos días tiene un año?",
    "Что такое атом?", "Write a Python function that reverses a string.\n\n```python\ndef reverse(text):\n```",
    "Is 91 a prime number? Answer yes or no, and say why.", "Summarize in one sentence:\n\nWater boils at 100 °C.",
    "What does HTTP stand for?", "List the steps to make tea.\n1.", "Who wrote Hamlet?",
    "🙂 What does this emoji mean?", "Say nothing but the word “done”.",
)  # fmt: skip


@dataclass(frozen=True)
class CheckPrompts:
    """What is replayed, as messages, and where it is from."""

    source: str
    rows: Sequence[list[Message]]
    left_out: int
    """Prompts before the last of these that cannot be replayed."""


def check_prompts(source: str | None, count: int, artefact: Artefact, tokenizer: Any) -> CheckPrompts:
    """At most `count` prompts that plain text can carry: none with a control token's name in it, none that was cut.

    Raises:
        DataError, StorageError, UsageError: --prompts names none that can be used.
    """
    name, rows = _named(source) if source else _held_out(artefact, tokenizer)
    chat = Chat(tokenizer)
    limit = int(artefact.settings.get("max_prompt_length") or sys.maxsize)
    usable: list[list[Message]] = []
    left_out = 0
    for prompt in rows:
        messages = as_messages(prompt)
        held = any(chat.encoder.pattern.search(message["content"]) for message in messages)
        if held or len(chat.prompt_ids(messages)) > limit:
            left_out += 1
        else:
            usable.append(messages)
        if len(usable) == count:
            break
    if not usable:
        raise DataError(
            f"{name} has no prompt that can be replayed: each is longer than {limit} tokens or holds the name of a "
            "control token. Name other prompts with --prompts."
        )
    return CheckPrompts(name, usable, left_out)


def as_messages(prompt: Prompt) -> list[Message]:
    """A text is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _held_out(artefact: Artefact, tokenizer: Any) -> tuple[str, Sequence[Prompt]]:
    """The prompts of the pairs that the run held out, or the built-in list where there are none any more."""
    settings = artefact.settings
    holds_out = settings.get("eval_dataset") or settings.get("eval_split") or settings.get("eval_fraction")
    if settings.get("dataset") is None or settings.get("objective", "dpo") != "dpo" or not holds_out:
        return "the built-in prompts", BUILT_IN
    known = {option.name: settings[option.name] for option in fields(DataOptions) if option.name in settings}
    try:
        data = load_training_data(DataOptions(**known), tokenizer, int(settings.get("seed", 42)))
        wanted, start = set(data.held_out), 0
        prompts: list[Prompt] = []
        for source in data.sources:
            assert isinstance(source, PairDataset)
            if any(start <= place < start + len(source) for place in wanted):
                texts = kept_texts(tokenized_source(source))
                prompts += [pair.prompt for place, pair in texts if start + place in wanted]
            start += len(source)
    except (DataError, StorageError) as error:
        print(f"The pairs that the run held out cannot be read, so the built-in prompts are taken: {error}")
        return "the built-in prompts", BUILT_IN
    return (f"the {len(prompts)} pairs that the run held out", prompts) if prompts else (
        "the built-in prompts", BUILT_IN
    )  # fmt: skip


def _named(source: str) -> tuple[str, Sequence[Prompt]]:
    return f"--prompts {source}", list(_read(source))


def _read(source: str) -> Iterator[Prompt]:
    names = ColumnNames()
    for row in read_rows(source):
        if isinstance(row, RefusedRow):
            raise DataError(f"--prompts {source}: {row}. Correct the row.")
        try:
            if row.values.get(names.prompt) is not None:
                yield read_prompt(row.values, names.prompt)
            else:
                yield prompt_of(parse_row(detect_format(row.values, names), row.values, names, row.origin).pair)
        except NoPreferenceError:
            continue
        except RowError as error:
            raise DataError(f"{row.origin}: {error.field}: {error.reason}. Correct the row.") from error
