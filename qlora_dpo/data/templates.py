"""The chat template of a run: the tokenizer's own or a named one, with the arguments that the run gives it.

Named templates are for models whose tokenizer has none. They are chat templates in Jinja, so a run saves the one it
used with the tokenizer, and every program that loads the run renders prompts the same way. None writes an end token:
the end-of-text token is added to the last answer.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_dpo.config.checks import nearest
from qlora_dpo.data.control_tokens import uses_bos
from qlora_dpo.data.template_clock import pin_date, recorded_date
from qlora_dpo.environment import cache_folder
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


def set_up_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    system_prompt: str = "keep",
    date: str | None = None,
) -> None:
    """Give the tokenizer the chat template that conversations are written with.

    It is the named one or its own. What the options say becomes a part of it, so that every program that loads the
    tokenizer writes conversations alike: template arguments as their defaults (`enable_thinking`), the system prompt
    in front of the first question where it is to be folded, and BOS where the model expects one and the template
    writes none. A tokenizer that is set up again stays as it is. A template that writes today's date writes `date`
    instead, by default the day that it was first used on this machine.

    Raises:
        UsageError: when there is no template to use, or no template of that name; when it would ignore an argument.
    """
    apply_prompt_template(tokenizer, prompt_template)
    _refuse_unread(chat_template_kwargs or {}, str(tokenizer.chat_template))
    before = "".join(_default(name, value) for name, value in (chat_template_kwargs or {}).items())
    if system_prompt == "fold":
        before += _FOLD_SYSTEM
    if uses_bos(tokenizer) and not _writes_bos(tokenizer):
        before += "{{- bos_token -}}"
    # What is written last keeps the line break that a template may begin with.
    _put_before(tokenizer, before + "{{ '' }}" if before else "")
    pin_date(tokenizer, date or recorded_date(tokenizer, cache_folder()))


def _refuse_unread(arguments: Mapping[str, Any], template: str) -> None:
    words = set(re.findall(r"[A-Za-z_][A-Za-z_0-9]*", template))
    unread = [name for name in arguments if name.isidentifier() and name not in words]
    if unread:
        raise UsageError(
            f"--chat_template_kwargs: the chat template reads no argument {unread[0]!r}{nearest(unread[0], words)}. "
            "Correct its name, or leave it out."
        )


def _default(name: str, value: Any) -> str:
    if not name.isidentifier():
        raise UsageError(f"--chat_template_kwargs: {name!r} is no name of a template's argument.")
    return f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(name, value)} -%}}{{%- endif -%}}"


def _literal(name: str, value: Any) -> str:
    """A JSON value as Jinja writes it, which is as Python does."""
    try:
        return repr(json.loads(json.dumps(value)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"--chat_template_kwargs: the value of {name} is no JSON value ({error}).") from error


_FOLD_SYSTEM = (
    "{%- set fold = namespace(system='', turns=0, leads=true) -%}"
    "{%- for message in messages -%}"
    "{%- if fold.leads and message['role'] == 'system' -%}"
    "{%- set between = '\n\n' if fold.system and message['content'] else '' -%}"
    "{%- set fold.system = fold.system + between + message['content'] -%}"
    "{%- set fold.turns = loop.index -%}"
    "{%- else -%}{%- set fold.leads = false -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if fold.turns and messages | length > fold.turns and messages[fold.turns]['role'] == 'user' -%}"
    "{%- set question = messages[fold.turns] -%}"
    "{%- if fold.system -%}"
    "{%- set question = dict(question, content=fold.system + '\n\n' + question['content']) -%}"
    "{%- endif -%}"
    "{%- set messages = [question] + messages[fold.turns + 1:] -%}"
    "{%- endif -%}"
)


def _put_before(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = {name: _joined(text, one) for name, one in template.items()}
    else:
        template = _joined(text, template)
    tokenizer.chat_template = template


def _joined(text: str, template: str) -> str:
    return template if template.startswith(text) else text + template


def _writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """A rendered question begins with BOS, or cannot be rendered."""
    render: Any = tokenizer.apply_chat_template
    try:
        text: str = render([{"role": "user", "content": "question"}], tokenize=False, add_generation_prompt=True)
    except Exception:  # what is wrong with it is said where it is used
        return True
    return text.startswith(str(tokenizer.bos_token))


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
