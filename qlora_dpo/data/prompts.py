"""Prompts out of rows that have no answers to learn from, or whose answers nobody wants."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from qlora_dpo.data.columns import add_content
from qlora_dpo.data.messages import check_prompt, messages_of, with_saved_messages
from qlora_dpo.data.pair_formats.layout import Prompt, text_prompt
from qlora_dpo.data.preferences import Message, PreferencePair, RowError
from qlora_dpo.data.values import Values


def read_prompt(values: Values, column: str, read: Collection[str] = ()) -> Prompt:
    """The prompt in a column, text or messages, with the system prompt and what else the row says beside it.

    `read` are columns that the caller reads for something else.

    Raises:
        RowError: when there is no prompt, or it needs what only training gives a chat template.
    """
    values = with_saved_messages(values, (column,))
    if isinstance(values.get(column), (list, dict)):
        prompt: Prompt = tuple(messages_of(column, values[column]))
        check_prompt(column, prompt)  # type: ignore[arg-type]
    else:
        prompt = text_prompt(values, column)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    others = ("reasoning_content", *_longer_dialogues(values, messages))  # type: ignore[arg-type]
    content = add_content(values, (column, *read, *others), messages)  # type: ignore[arg-type]
    if content is None:
        return prompt
    _refuse_template_arguments(content.tools, content.chat_template_kwargs)
    return tuple(content.messages)


def _longer_dialogues(values: Values, prompt: Sequence[Message]) -> Iterator[str]:
    """The columns with a dialogue that the prompt begins; what was said after it is not asked again."""
    for column in ("messages", "conversations"):
        value = values.get(column)
        if isinstance(value, list) and value:
            messages = messages_of(column, value, may_end_empty=True)
            if messages[: len(prompt)] == list(prompt):
                yield column


def prompt_of(pair: PreferencePair) -> Prompt:
    """The prompt of a pair. Raises: RowError as `read_prompt`."""
    _refuse_template_arguments(pair.tools, pair.chat_template_kwargs)
    return pair.prompt


def _refuse_template_arguments(tools: Collection[Any], arguments: Mapping[str, Any]) -> None:
    for column, value in (("tools", tools), ("chat_template_kwargs", arguments)):
        if value:
            raise RowError(column, f"prompts that need {column} are not supported here")
