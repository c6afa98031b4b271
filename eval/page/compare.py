"""The tab Compare: one prompt, both answers while they are written, how likely they are, and where they differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from markupsafe import Markup

from eval.page.answers import Answer, Asked
from eval.page.limits import MAX_PROMPT_CHARACTERS, MAX_TEMPERATURE, number_of, prompt_of
from eval.page.parts import MODEL_QUEUE, Page, answer_card, light, recorded_card, sentences, side_by_side
from eval.page.prompts import Pick
from eval.page.text import block, notice

USUAL_TOKENS = 128


def compare_tab(page: Page, blocks: gr.Blocks) -> None:
    """Build the tab; without a model it shows recorded answers."""
    words = page.words
    if page.model is None:
        _recorded(page, blocks)
        return
    prompt = gr.Textbox(
        label=words("prompt"), placeholder=words("prompt_placeholder"), lines=3, max_lines=12,
        max_length=MAX_PROMPT_CHARACTERS, autofocus=True, elem_id="compare-prompt",
    )  # fmt: skip
    picker = _picker(page, blocks)
    longest = page.model.longest_answer
    with gr.Accordion(words("parameters"), open=False), gr.Row():
        tokens = gr.Slider(1, longest, value=min(USUAL_TOKENS, longest), step=1, label=words("max_new_tokens"))
        temperature = gr.Slider(0, MAX_TEMPERATURE, value=0, step=0.05, label=words("temperature"))
        seed = gr.Number(0, precision=0, label=words("seed"))
    with gr.Row(elem_classes="actions"):
        ask = gr.Button(words("compare"), variant="primary", elem_id="compare-ask", scale=3)
        stop = gr.Button(words("stop"), elem_id="compare-stop", scale=1)
    answers = gr.HTML(
        _both(page, Answer(), Answer(), None), apply_default_css=False, elem_classes="shown", elem_id="compare-answers"
    )

    def answer(text: Any, tokens: Any, temperature: Any, seed: Any) -> Iterator[Markup]:
        with sentences(words):
            yield from _answers(page, text, tokens, temperature, seed)

    inputs = [prompt, tokens, temperature, seed]
    # The queue's own overlay would hide what is being written.
    asking = gr.on(
        [ask.click, prompt.submit], answer, inputs, [answers], api_name="compare", concurrency_id=MODEL_QUEUE,
        concurrency_limit=1, show_progress="minimal",
    )  # fmt: skip
    stop.click(None, None, None, cancels=[asking])

    def picked(number: Any) -> str:
        pick = _pick(page, number)
        return pick.text if pick else ""

    picker.input(picked, [picker], [prompt], **light(api_name=False))


def _answers(page: Page, text: Any, tokens: Any, temperature: Any, seed: Any) -> Iterator[Markup]:
    assert page.model is not None
    prompt = prompt_of(text, page.words)
    asked = Asked(
        prompt=page.prompts.prompt_of(prompt),
        max_new_tokens=int(number_of(tokens, 1, page.model.longest_answer, USUAL_TOKENS)),
        temperature=number_of(temperature, 0, MAX_TEMPERATURE, 0),
        seed=int(number_of(seed, 0, 2**31 - 1, 0)),
    )
    yield _both(page, Answer(), Answer(), "before")
    before, after = Answer(), Answer()
    for before, after in page.model.stream(asked):
        yield _both(page, before, after, "after" if before.ended else "before")
    yield _both(page, before, after, None)


def _both(page: Page, before: Answer, after: Answer, turn: str | None) -> Markup:
    left, right = (
        answer_card(side, answer, page.words, is_turn=turn == side and answer.ended is None)
        for side, answer in (("before", before), ("after", after))
    )
    same = Markup("")
    if before.parts and before.text == after.text:
        same = Markup('<div class="report">{}</div>').format(notice(page.words("same_text")))
    return side_by_side(left, right) + same


def _picker(page: Page, blocks: gr.Blocks) -> gr.Dropdown:
    """Prompts to pick, filled in when the page is opened."""
    picker = gr.Dropdown([], value=None, label=page.words("pick"), elem_id="compare-pick", filterable=True)

    def choices() -> Any:
        with sentences(page.words):
            origin, found = page.prompts.picks()
            options = [(pick.label, number) for number, pick in enumerate(found)]
            return gr.update(choices=options, label=page.words(origin))

    blocks.load(choices, None, [picker], **light(api_name=False))
    picker.focus(choices, None, [picker], **light(api_name=False))
    return picker


def _pick(page: Page, number: Any) -> Pick | None:
    with sentences(page.words):
        found = page.prompts.picks()[1]
    return found[number] if isinstance(number, int) and 0 <= number < len(found) else None


def _recorded(page: Page, blocks: gr.Blocks) -> None:
    """A recorded prompt with its recorded answers."""
    words = page.words
    picker = _picker(page, blocks)
    shown = gr.HTML(apply_default_css=False, elem_classes="shown", elem_id="compare-answers")

    def show(number: Any) -> Markup:
        pick = _pick(page, 0 if number is None else number)
        if pick is None or pick.row is None:
            return Markup('<div class="report">{}</div>').format(notice(words("no_rows")))
        row = pick.row
        head = Markup('<div class="report asked">{}</div>').format(block(pick.text, "prompt"))
        tail = Markup("")
        if row.reference_answer:
            tail = Markup('<div class="report"><details><summary>{}</summary>{}</details></div>').format(
                words("reference_answer"), block(row.reference_answer)
            )
        both = side_by_side(recorded_card("before", row.before, words), recorded_card("after", row.after, words))
        return head + both + tail

    picker.input(show, [picker], [shown], **light(api_name=False))
    blocks.load(show, [picker], [shown], **light(api_name=False))
