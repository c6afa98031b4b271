"""Named prompt templates for models whose tokenizer has no chat template.

They are chat templates in Jinja, so a run saves the one it used with the tokenizer, and every program that
loads the run renders prompts the same way. None writes an end token: the end-of-text token is added to the
last answer.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from qlora_dpo.data.control_tokens import uses_bos
from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The form of Anthropic's hh-rlhf dialogues; a system message stands before the first turn.
_HH_RLHF = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\nAssistant: ' + message['content'] }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

# Alpaca's wording, which Anima was trained with; later turns repeat the headings, a system message replaces
# the introduction.
_ANIMA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}{{ 'Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '\\n\\n### Instruction:\\n' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '\\n\\n### Response: ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:' }}{% endif %}"
)

# Only the texts, a blank line after each.
_PLAIN = (
    "{% for message in messages %}{{ message['content'] + ('' if loop.last else '\\n\\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n' }}{% endif %}"
)

PROMPT_TEMPLATES: dict[str, str] = {"hh-rlhf": _HH_RLHF, "anima": _ANIMA, "plain": _PLAIN}


def apply_prompt_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Give the tokenizer the named template, or keep its own when no name is given.

    Raises:
        UsageError: when there is no template to use, or no template of that name.
    """
    choices = ", ".join(PROMPT_TEMPLATES)
    if name is None:
        if not tokenizer.chat_template:
            raise UsageError(
                f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template, so nothing "
                f"says how a prompt is written; name one with --prompt_template ({choices})."
            )
        return
    if name not in PROMPT_TEMPLATES:
        near = difflib.get_close_matches(name, PROMPT_TEMPLATES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"--prompt_template {name!r} is not known; choose one of {choices}.{hint}")
    # Programs that tokenize a rendered chat add no BOS themselves, so the template has to write it.
    tokenizer.chat_template = ("{{ bos_token }}" if uses_bos(tokenizer) else "") + PROMPT_TEMPLATES[name]
