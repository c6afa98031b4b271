"""Texts of models, data and visitors as parts of the page: always escaped, and without what a browser hides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from eval import texts
from qlora_dpo.data.preferences import Message

LONGEST = 20_000  # characters of a text that are shown


def showable(text: str, longest: int = LONGEST) -> str:
    """As in the report, but longer."""
    return texts.showable(text, longest)


def plain(prompt: str | Sequence[Message]) -> str:
    """A prompt as a person reads it; of several messages each with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}:\n{message['content']}" for message in prompt)


def block(text: str, kind: str = "") -> Markup:
    """A text on lines of its own."""
    return Markup('<div class="text {}" dir="auto">{}</div>').format(kind, showable(text))


def chips(values: Iterable[str | Markup]) -> Markup:
    """Short facts in a row."""
    return Markup('<ul class="chips">{}</ul>').format(
        Markup("").join(Markup("<li>{}</li>").format(one) for one in values)
    )


def notice(text: str) -> Markup:
    """A sentence instead of what is not there."""
    return Markup('<p class="note">{}</p>').format(showable(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table whose first column is words and whose others are numbers."""

    def cells(tag: str, values: Sequence[str]) -> Markup:
        return Markup("").join(
            Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), Markup(' class="number"') if place else "", showable(value))
            for place, value in enumerate(values)
        )

    lines = [cells("th", head), *(cells("td", row) for row in rows)]
    body = Markup("").join(Markup("<tr>{}</tr>").format(line) for line in lines)
    return Markup('<div class="card wide"><table>{}</table></div>').format(body)


def spans(pieces: Iterable[tuple[str, float, str]], strongest: float = 2.0) -> Markup:
    """A text whose pieces are colored by a number, from -strongest to strongest, each with what is said about it."""
    parts = []
    for text, value, said in pieces:
        share = max(-1.0, min(1.0, value / strongest))
        name = "up" if share > 0 else "down"
        parts.append(
            Markup('<span class="{}" style="--heat:{:.0f}%" title="{}">{}</span>').format(
                Markup(name), 70 * abs(share), said, escape(showable(text))
            )
        )
    return Markup('<div class="text heat" dir="auto">{}</div>').format(Markup("").join(parts))
