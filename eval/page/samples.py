"""The tab Samples: recorded answers, filtered, searched, page by page, and saved as a file by the browser."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from markupsafe import Markup

from eval.answers import WINNERS, Row, Verdict
from eval.page.parts import Page, light, recorded_card, sentences, side_by_side
from eval.page.source import Recorded
from eval.page.text import block, chips, notice, plain, showable
from eval.page.words import Words

PER_PAGE = 10
MOST_SAVED = 10_000
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # what makes a program take a cell for a formula
COLUMNS = (
    "id",
    "category",
    "prompt",
    "before",
    "after",
    "reference_answer",
    "verdicts",
    "reward_before",
    "reward_after",
)

ORDERS: dict[str, Callable[[Row], float]] = {
    "order_file": lambda row: 0,
    "order_longer": lambda row: row.before.tokens - row.after.tokens,
    "order_reward": lambda row: row.before.reward - row.after.reward,
    "order_fell": lambda row: row.after.reward - row.before.reward,
}

# The browser makes the file: nothing is served from the disk.
SAVE = """(text, name) => {
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/plain;charset=utf-8"}));
  link.download = "%s";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""


@dataclass(frozen=True)
class Filter:
    """Which rows are wanted; empty means all."""

    search: str = ""
    category: str = ""
    winner: str = ""
    order: str = "order_file"

    def __call__(self, recorded: Recorded) -> list[Row]:
        """The rows that fit, in order."""
        needle, said = self.search.casefold().strip(), _verdicts(recorded)
        found = [
            row
            for row in recorded.rows
            if (not self.category or showable(row.category or "") == self.category)
            and (not self.winner or any(verdict.winner == self.winner for verdict in said.get(row.id, ())))
            and (not needle or needle in "\n".join((plain(row.prompt), row.before.text, row.after.text)).casefold())
        ]
        return sorted(found, key=ORDERS.get(self.order, ORDERS["order_file"]))


def samples_tab(page: Page, blocks: gr.Blocks) -> None:
    """Build the tab."""
    words = page.words
    with gr.Row(elem_classes="filters"):
        search = gr.Textbox(
            label=words("search"), placeholder=words("search_placeholder"), max_length=200, elem_id="samples-search",
            min_width=220, scale=2,
        )  # fmt: skip
        category = gr.Dropdown(
            [(words("any"), "")], value="", label=words("category"), min_width=140, elem_id="samples-category"
        )
        winners = [(words("any"), ""), *((words(f"winner_{one}"), one) for one in WINNERS)]
        winner = gr.Dropdown(winners, value="", label=words("winner"), min_width=140, elem_id="samples-winner")
        order = gr.Dropdown(
            [(words(one), one) for one in ORDERS], value="order_file", label=words("order"), min_width=140
        )
    number = gr.State(0)
    shown = gr.HTML(apply_default_css=False, elem_classes="shown", elem_id="samples-rows")
    with gr.Row(elem_classes="actions"):
        previous = gr.Button(words("previous"), elem_id="samples-previous", min_width=110)
        following = gr.Button(words("following"), elem_id="samples-next", min_width=110)
        saving = {name: gr.Button(words(f"export_{name}"), min_width=110, elem_id=f"samples-{name}") for name in SAVED}
    content = gr.Textbox(visible=False)
    wanted: list[Any] = [search, category, winner, order]

    def show(move: int | None, place: int, *values: Any) -> list[Any]:
        with sentences(words):
            recorded = page.source.recorded()
            rows = _filter(values)(recorded)
        last = max(0, (len(rows) - 1) // PER_PAGE)
        place = 0 if move is None else max(0, min(last, place + move))
        return [
            place, _page(rows, place, recorded, words), gr.update(interactive=place > 0),
            gr.update(interactive=place < last),
        ]  # fmt: skip

    def categories() -> Any:
        with sentences(words):
            names = sorted({showable(row.category) for row in page.source.recorded().rows if row.category})
        return gr.update(choices=[(words("any"), ""), *((name, name) for name in names)])

    outputs = [number, shown, previous, following]
    gr.on(
        [blocks.load, *(one.change for one in wanted)], lambda *values: show(None, *values), [number, *wanted], outputs,
        **light(api_name="samples"),
    )  # fmt: skip
    blocks.load(categories, None, [category], **light(api_name=False))
    previous.click(lambda *values: show(-1, *values), [number, *wanted], outputs, **light(api_name=False))
    following.click(lambda *values: show(1, *values), [number, *wanted], outputs, **light(api_name=False))
    for name, button in saving.items():

        def save(*values: Any, form: Callable[[Recorded, Sequence[Row]], str] = SAVED[name]) -> str:
            with sentences(words):
                recorded = page.source.recorded()
                return form(recorded, _filter(values)(recorded)[:MOST_SAVED])

        button.click(save, wanted, [content], **light(api_name=f"save_{name}")).then(
            None, [content], None, js=SAVE % f"comparison.{name}"
        )


def _filter(values: Sequence[Any]) -> Filter:
    return Filter(*(value[:200] if isinstance(value, str) else "" for value in values))


def _verdicts(recorded: Recorded) -> Mapping[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in recorded.verdicts:
        found.setdefault(verdict.id, []).append(verdict)
    return found


def _page(rows: Sequence[Row], place: int, recorded: Recorded, words: Words) -> Markup:
    if not rows:
        name = "none_found" if recorded.rows else "no_rows"
        return Markup('<div class="report">{}</div>').format(notice(words(name)))
    first = place * PER_PAGE
    part, said = rows[first : first + PER_PAGE], _verdicts(recorded)
    count = words("shown", first=first + 1, last=first + len(part), count=f"{len(rows):,}")
    body = Markup("").join(_row(row, said.get(row.id, ()), words) for row in part)
    return Markup('<div class="report"><p class="note count">{}</p></div>{}').format(count, body)


def _row(row: Row, verdicts: Sequence[Verdict], words: Words) -> Markup:
    tones = {"after": "ok", "before": "bad", "tie": ""}
    said: list[str | Markup] = [showable(row.category)] if row.category else []
    said += [
        Markup('{}: <b class="{}">{}</b>').format(
            showable(one.method), tones[one.winner], words(f"winner_{one.winner}")
        )
        for one in verdicts
    ]
    head = block(plain(row.prompt), "prompt") + (chips(said) if said else Markup(""))
    both = side_by_side(recorded_card("before", row.before, words), recorded_card("after", row.after, words))
    reference = Markup("")
    if row.reference_answer:
        reference = Markup("<details><summary>{}</summary>{}</details>").format(
            words("reference_answer"), block(row.reference_answer)
        )
    return Markup('<article class="row"><div class="report">{}</div>{}<div class="report">{}</div></article>').format(
        head, both, reference
    )


def as_csv(recorded: Recorded, rows: Sequence[Row]) -> str:
    """The rows as CSV, in which no cell is a formula."""
    said = _verdicts(recorded)
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    for row in rows:
        verdicts = "; ".join(f"{one.method}: {one.winner}" for one in said.get(row.id, ()))
        texts = (row.id, row.category or "", plain(row.prompt), row.before.text, row.after.text)
        more = (row.reference_answer or "", verdicts)
        writer.writerow([*map(_cell, (*texts, *more)), row.before.reward, row.after.reward])
    return file.getvalue()


def as_jsonl(recorded: Recorded, rows: Sequence[Row]) -> str:
    """The rows as JSON lines."""
    said = _verdicts(recorded)
    lines = [
        {
            "id": row.id, "prompt": row.prompt, "category": row.category, "before": row.before.text,
            "after": row.after.text, "reference_answer": row.reference_answer,
            "verdicts": {one.method: one.winner for one in said.get(row.id, ())},
        }
        for row in rows
    ]  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def _cell(text: str) -> str:
    text = text.encode("utf-8", "replace").decode().replace("\x00", "")
    return f"'{text}" if text.startswith(_FORMULA) else text


SAVED: dict[str, Callable[[Recorded, Sequence[Row]], str]] = {"csv": as_csv, "jsonl": as_jsonl}
