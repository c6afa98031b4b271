"""A Modelfile for Ollama beside a GGUF file.

Ollama does not run the Jinja chat template that the file embeds: without a TEMPLATE it compares that text with some
twenty templates of its own, takes one that differs in less than 100 characters, and else sends the bare prompt. So the
template is written in Go's language, learned from what the chat template renders, and only where it renders the same.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qlora_dpo.data.chat import Chat
from qlora_dpo.data.control_tokens import uses_bos
from qlora_dpo.errors import UsageError

Turns = Sequence[tuple[str, str]]


class NotConcatenated(Exception):
    """The chat template does more than to put fixed text around each message."""


@dataclass(frozen=True)
class FixedText:
    """What a chat template writes around messages."""

    lead: str
    """Before everything, where no system message begins the conversation."""
    system: tuple[str, str] | None
    """Around a system message, with what stands before it; None where the template takes none."""
    user: str
    """Before a user's message."""
    answer: tuple[str, str]
    """Between the user's message and the answer, and after the answer."""
    generation: str
    """Between the user's message and the answer that is to be written."""

    def render(self, turns: Turns) -> str:
        """The conversation up to where the next answer begins."""
        text = "" if self.system and turns[0][0] == "system" else self.lead
        around = {"system": self.system or ("", ""), "user": (self.user, ""), "assistant": self.answer}
        text += "".join(around[role][0] + content + around[role][1] for role, content in turns)
        return text if turns[-1][0] == "assistant" else text + self.generation

    def in_go(self) -> str:
        """The same in the language of Ollama's TEMPLATE."""
        branches = [("user", _go(self.user), ""), ("assistant", *map(_go, self.answer))]
        if self.system:
            branches.append(("system", *map(_go, self.system)))
        each = "".join(
            f'{{{{ {"else " if place else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for place, (role, before, after) in enumerate(branches)
        )
        lead = _go(self.lead)
        if lead and self.system:  # which a system message replaces
            lead = f'{{{{ with index .Messages 0 }}}}{{{{ if ne .Role "system" }}}}{lead}{{{{ end }}}}{{{{ end }}}}'
        return f"{lead}{{{{ range .Messages }}}}{each}{{{{ end }}}}{{{{ end }}}}{_go(self.generation)}"


def modelfile(tokenizer: Any, gguf_name: str) -> str:
    """The Modelfile's text."""
    lines = [f"FROM ./{gguf_name}"]
    try:
        fixed = fixed_text(tokenizer)
        if fixed.system is None:
            lines.append("# The chat template takes no system message: one would be left out.")
        lines.append(f'TEMPLATE """{fixed.in_go()}"""')
    except NotConcatenated as error:
        lines.append(f"# No TEMPLATE: {error}. Ollama guesses one of its own by likeness, or sends the bare prompt:")
        lines.append("# compare its answers with `release check`, or write a TEMPLATE (docs.ollama.com/modelfile).")
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stop_texts(tokenizer)]
    return "\n".join(lines) + "\n"


def stop_texts(tokenizer: Any) -> list[str]:
    """What ends an answer: the token that ends a turn, and the end of text."""
    try:
        end = tokenizer.convert_ids_to_tokens(Chat(tokenizer).form.end_id) if tokenizer.chat_template else None
    except UsageError:
        end = None
    return list(dict.fromkeys(text for text in (end, tokenizer.eos_token) if text))


def fixed_text(tokenizer: Any) -> FixedText:
    """Learn from rendered conversations what stands around each message.

    Raises:
        NotConcatenated: there is no template, or it does more than that.
    """
    if not tokenizer.chat_template:
        raise NotConcatenated("the tokenizer has no chat template")
    one, two, three, four = (f"m{secrets.token_hex(6)}" for _ in range(4))
    whole = [("user", one), ("assistant", two), ("user", three), ("assistant", four)]
    try:
        before, between, across, again, close = _cut(_render(tokenizer, whole, False), one, two, three, four)
        start, generation = _cut(_render(tokenizer, whole[:1], True), one)
    except Exception as error:  # a template is a program and raises what it likes
        raise NotConcatenated(f"the chat template cannot be read as fixed text ({error})") from error
    if (start, again) != (before, between) or not across.startswith(close):
        raise NotConcatenated("the chat template writes turns in more than one way")
    user = across.removeprefix(close)
    if not before.endswith(user):
        raise NotConcatenated("the chat template writes the first turn in another way")
    fixed = FixedText(before[: len(before) - len(user)], None, user, (between, close), generation)
    fixed = _with_system(fixed, tokenizer, whole)
    _check(fixed, tokenizer, whole)
    return _without_bos(fixed, tokenizer)


def _with_system(fixed: FixedText, tokenizer: Any, turns: Turns) -> FixedText:
    marker = f"m{secrets.token_hex(6)}"
    try:
        opening, closing, _ = _cut(_render(tokenizer, [("system", marker), *turns], False), marker, turns[0][1])[:3]
    except Exception:  # refused, or left out
        return fixed
    if not closing.endswith(fixed.user):
        return fixed
    system = opening, closing[: len(closing) - len(fixed.user)]
    learned = FixedText(fixed.lead, system, fixed.user, fixed.answer, fixed.generation)
    asked = [("system", marker), *turns[:3]]
    return learned if learned.render(asked) == _render(tokenizer, asked, True) else fixed


def _check(fixed: FixedText, tokenizer: Any, turns: Turns) -> None:
    """Raises:
    NotConcatenated: the template trims, or renders a longer conversation in another way.
    """
    spaced = [("user", " a b \n"), ("assistant", "c\n\nd "), ("user", "é 中")]
    for asked in (turns[:1], turns[:3], spaced[:1], [*turns, *turns[:1]], spaced):
        if fixed.render(asked) == _render(tokenizer, asked, True):
            continue
        stripped = [(role, content.strip()) for role, content in asked]
        if asked[0] is not spaced[0] or fixed.render(stripped) != _render(tokenizer, asked, True):
            raise NotConcatenated("the chat template writes a longer conversation in another way")


def _without_bos(fixed: FixedText, tokenizer: Any) -> FixedText:
    """Ollama adds BOS itself where the file says so; two would be one too many."""
    if not uses_bos(tokenizer):
        return fixed
    bos = tokenizer.bos_token
    system = fixed.system and (fixed.system[0].removeprefix(bos), fixed.system[1])
    return FixedText(fixed.lead.removeprefix(bos), system, fixed.user, fixed.answer, fixed.generation)


def _render(tokenizer: Any, turns: Turns, generation: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))


def _cut(text: str, *markers: str) -> list[str]:
    parts = []
    for marker in markers:
        part, found, text = text.partition(marker)
        if not found:
            raise ValueError("a message is left out")
        parts.append(part)
    return [*parts, text]


def _go(text: str) -> str:
    """A text as an action of a Go template, which keeps its spaces and line ends."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
