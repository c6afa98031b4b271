"""Chat templates with the traits of those in use, tokenizers for any template, and conversations of every kind."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.conftest import SHARED, _byte_bpe

from qlora_dpo.data.preferences import Message

_HEAD = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
_END = "{{- '<|im_end|>\n' -}}{%- endfor -%}"
_ASK = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
_ASK_OPEN = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"

OWN = {
    # Only the last answer keeps its thought, and gets an empty one where it has none (Qwen3).
    "closes_thought": _HEAD
    + "{%- set text = m.content -%}{%- if m.role == 'assistant' -%}"
    "{%- set thought = m.reasoning_content or '' -%}"
    "{%- if '</think>' in text -%}{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{%- if loop.last -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}{%- endif -%}{{- text -}}"
    + _END
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}",
    # The same behind a generation prompt that opens the thought (Qwen3.5).
    "opens_and_closes": _HEAD
    + "{%- set text = m.content -%}{%- if m.role == 'assistant' and loop.last -%}"
    "{%- set thought = m.reasoning_content or '' -%}"
    "{%- if '</think>' in text -%}{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}{{- text -}}"
    + _END
    + _ASK_OPEN,
    # An empty thought is written otherwise than the generation prompt opens one (Nemotron-3).
    "opens_thought": _HEAD
    + "{%- if m.role == 'assistant' and '</think>' not in m.content -%}{{- '<think></think>' -}}{%- endif -%}"
    "{{- m.content -}}"
    + _END
    + _ASK_OPEN,
    # Thoughts are dropped from every answer (DeepSeek-R1).
    "drops_thought": _HEAD + "{{- m.content.split('</think>')[-1] -}}" + _END + _ASK_OPEN,
    # Two control tokens end an answer (Command-R7B).
    "two_ends": "{%- for m in messages -%}{{- '<|start|>' + m.role + '\n' -}}"
    "{{- ('<|say|>' + m.content + '<|said|>' if m.role == 'assistant' else m.content) + '<|im_end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant\n<|say|>' -}}{%- endif -%}",
    # The last answer ends otherwise than earlier ones (gpt-oss), and the channel belongs to the answer.
    "returns": "{%- for m in messages -%}{{- '<|start|>' + m.role -}}{%- if m.role == 'assistant' -%}"
    "{%- if loop.last and 'thinking' in m -%}"
    "{{- '<|channel|>analysis<|message|>' + m.thinking + '<|end|><|start|>assistant' -}}{%- endif -%}"
    "{{- '<|channel|>final' -}}{%- endif -%}{{- '<|message|>' + m.content -}}"
    "{{- '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}",
    # eos at the end of a conversation, but not of a turn (Phi-3).
    "eos_last": "{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}",
    "trims": "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' -}}"
    "{%- endfor -%}" + _ASK,
    "no_system": "{%- for m in messages -%}{%- if m.role == 'system' -%}"
    "{{- raise_exception('this model has no system role') -}}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}" + _ASK,
    "drops_system": "{%- for m in messages -%}{%- if m.role != 'system' -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}" + _ASK,
    "today": "{{- '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '.<|im_end|>\n' -}}"
    + _HEAD + "{{- m.content -}}" + _END + _ASK,
    "parts_only": _HEAD
    + "{%- for part in m.content -%}{%- if part.type == 'text' -%}{{- part.text -}}{%- endif -%}{%- endfor -%}"
    + _END
    + _ASK,
    "no_generation_prompt": _HEAD + "{{- m.content -}}" + _END,
    # The next generation prompt is always there (Command A in some versions).
    "always_asks": "{%- for m in messages -%}{{- '<|start|><|' + m.role + '|>' + m.content + '<|end|>' -}}"
    "{%- endfor -%}{{- '<|start|><|assistant|>' -}}",
    "tools": "{%- if tools -%}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' -}}{%- endif -%}"
    + _HEAD
    + "{{- m.content -}}{%- for call in m.tool_calls or [] -%}{{- '\n<tool_call>' + call.function | tojson "
    "+ '</tool_call>' -}}{%- endfor -%}" + _END + _ASK,
}  # fmt: skip
USABLE = [name for name in OWN if name != "parts_only"]

_CONTROL = re.compile(r"<\|[^|<>\s]+\|?>|<[a-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_turn>|<start_of_image>")


def shared_templates() -> dict[str, str]:
    """The chat templates in use, by name; empty where they are not there."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(SHARED.glob("chat_templates/*.jinja"))}


def tokenizer_for(template: str) -> Any:
    """A byte-level tokenizer that knows the control tokens of a template, with `<think>` as ordinary tokens."""
    names = {f"<|{role}|>" for role in ("system", "user", "assistant")} if "'<|' + m.role" in template else set()
    specials = ["<s>", "</s>", "<pad>", *sorted(names | set(_CONTROL.findall(template)))]
    tokenizer = _byte_bpe(specials, template, eos_token="</s>", pad_token="<pad>")
    tokenizer.bos_token = "<s>"
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def template(name: str) -> str:
    return OWN.get(name) or Path(SHARED / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """A conversation and its answer; `must_hold` are the parts of the answer that are to be learned."""

    messages: list[Message]
    answer: Message
    must_hold: tuple[str, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def _says(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}  # type: ignore[typeddict-item]


_ASKED: Message = {"role": "user", "content": "What is 7 + 5?"}
_EARLIER: list[Message] = [
    {"role": "user", "content": "Hello"}, _says("<think>\nA greeting.\n</think>\n\nHi there"), _ASKED,
]  # fmt: skip
CASES = {
    "plain": Case([_ASKED], _says("Twelve."), ("Twelve.",)),
    "inline_thought": Case(
        [_ASKED], _says("<think>\nA sum of two.\n</think>\n\nTwelve."), ("A sum of two.", "</think>", "Twelve.")
    ),
    "tight_thought": Case([_ASKED], _says("<think>A sum</think>Twelve."), ("A sum", "</think>", "Twelve.")),
    "reasoning_content": Case(
        [_ASKED], _says("Twelve.", reasoning_content="A sum of two."), ("A sum of two.", "Twelve.")
    ),
    "system": Case([{"role": "system", "content": "Be brief."}, _ASKED], _says("Twelve."), ("Twelve.",)),
    "turns": Case(_EARLIER, _says("<think>\nA sum.\n</think>\n\nTwelve."), ("A sum.", "Twelve.")),
    "plain_turns": Case(_EARLIER, _says("Twelve."), ("Twelve.",)),
    "white_space": Case([_ASKED], _says("  Twelve. \n"), ("Twelve.",)),
    "line_first": Case([_ASKED], _says("\n\nTwelve."), ("Twelve.",)),
    "chinese": Case([{"role": "user", "content": "七加五是多少？"}], _says("十二。"), ("十二。",)),
    "no_thinking": Case([_ASKED], _says("Twelve."), ("Twelve.",), {"enable_thinking": False}),
}
