"""What several tabs show: an answer with its facts, two of them side by side, and errors as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup, escape

from eval.answers import Answer as Recorded
from eval.page.answers import Answer, Comparison
from eval.page.limits import Refused
from eval.page.prompts import PromptList
from eval.page.source import Source
from eval.page.text import block, spans
from eval.page.votes import Ballots
from eval.page.words import Language, Words
from eval.report.svg import short
from qlora_dpo.errors import QloraDpoError

MODEL_QUEUE = "model"


@dataclass(frozen=True)
class Page:
    """What the tabs are made of; `model` is None where only recorded answers are shown."""

    source: Source
    words: Words
    language: Language
    model: Comparison | None
    prompts: PromptList
    ballots: Ballots


@contextmanager
def sentences(words: Words) -> Iterator[None]:
    """Show a visitor what went wrong in one sentence, and nobody a traceback."""
    import gradio as gr

    try:
        yield
    except (Refused, QloraDpoError) as error:
        raise gr.Error(str(escape(str(error))), print_exception=False) from error
    except torch.OutOfMemoryError as error:
        raise gr.Error(words("no_memory"), print_exception=False) from error


def card(title: str, note: str, side: str, body: Markup, facts: list[str]) -> Markup:
    """An answer under its heading."""
    said = Markup("").join(Markup("<span>{}</span>").format(fact) for fact in facts)
    return Markup(
        '<div class="answer card {}"><h4>{} <span class="soft">{}</span></h4>{}<div class="said">{}</div></div>'
    ).format(side, title, note, body, said)


def side_by_side(left: Markup, right: Markup) -> Markup:
    """Two cards; one above the other on a phone."""
    return Markup('<div class="report"><div class="pair">{}{}</div></div>').format(left, right)


def answer_card(side: str, answer: Answer, words: Words, *, is_turn: bool = False) -> Markup:
    """An answer of this model, as far as it is written."""
    body = body_of(answer.text, words) if answer.text or answer.ended else _empty(words, is_turn)
    if is_turn and answer.text:
        body = Markup('<div class="writing">{}</div>').format(body)
    facts = facts_of_answer(answer, words)
    if answer.parts:
        pieces = (
            (
                part.text, part.log_ratio,
                words("heat_token", ratio=f"{part.log_ratio:+.2f}", before=short(part.before), after=short(part.after)),
            )
            for part in answer.parts
        )  # fmt: skip
        body += Markup('<details open><summary>{}</summary><p class="help">{}</p>{}</details>').format(
            words("heat"), words("heat_help"), spans(pieces)
        )
    return card(words(side), words("adapter_off" if side == "before" else "adapter_on"), side, body, facts)


def recorded_card(side: str, answer: Recorded, words: Words) -> Markup:
    """A recorded answer."""
    note = words("adapter_off" if side == "before" else "adapter_on")
    return card(words(side), note, side, body_of(answer.text, words), facts_of_recorded(answer, words))


def body_of(text: str, words: Words) -> Markup:
    """The text of an answer; a word where it is empty."""
    return block(text) if text.strip() else Markup('<div class="text soft">{}</div>').format(words("empty_answer"))


def facts_of_answer(answer: Answer, words: Words) -> list[str]:
    """Length, time, log-prob and reward, as far as they are known."""
    if not answer.tokens:
        return []
    facts = [words("tokens", count=f"{answer.tokens:,}"), words("seconds", value=f"{answer.seconds:.1f}")]
    if answer.ended == "length":
        facts.append(words("cut_off"))
    if answer.ended == "time":
        facts.append(words("stopped", seconds=f"{answer.seconds:.0f}"))
    if answer.parts:
        facts += _likely(answer.logp / answer.tokens, answer.logp, answer.reward, words)
    return facts


def facts_of_recorded(answer: Recorded, words: Words) -> list[str]:
    """The same of a recorded answer."""
    facts = [words("tokens", count=f"{answer.tokens:,}")]
    if answer.finish_reason == "length":
        facts.append(words("cut_off"))
    return facts + _likely(answer.logp_per_token, answer.logp, answer.reward, words)


def _likely(per_token: float, logp: float, reward: float, words: Words) -> list[str]:
    return [
        f"{words('logp', value=short(per_token))} ({words('logp_sum', value=short(logp))})",
        words("reward", value=short(reward)),
    ]


def _empty(words: Words, is_turn: bool) -> Markup:
    return Markup('<div class="text soft">{}</div>').format(words("writing" if is_turn else "nothing_asked"))


def light(**more: Any) -> dict[str, Any]:
    """How an event runs that needs no model: at once, past the queue."""
    return {"queue": False, "show_progress": "hidden", **more}
