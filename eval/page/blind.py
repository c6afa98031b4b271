"""The tab Blind A/B: two answers without names, four votes, the names after the vote, and how the votes stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from markupsafe import Markup

from eval.page.answers import Asked
from eval.page.compare import USUAL_TOKENS
from eval.page.limits import MAX_PROMPT_CHARACTERS, prompt_of
from eval.page.parts import MODEL_QUEUE, Page, body_of, card, facts_of_recorded, light, sentences, side_by_side
from eval.page.text import block, notice, plain
from eval.page.votes import VOTES, Ballot, Vote
from eval.report.svg import interval_bar
from qlora_dpo.labeling.human import SHORTCUTS


def blind_tab(page: Page, blocks: gr.Blocks) -> None:
    """Build the tab."""
    words = page.words
    gr.HTML(
        Markup('<div class="report">{}</div>').format(notice(words("blind_help"))),
        apply_default_css=False,
        elem_classes="shown",
    )
    token, skipped = gr.Textbox(visible=False), gr.State([])
    shown = gr.HTML(apply_default_css=False, elem_classes="shown", elem_id="blind-answers")
    with gr.Row(elem_classes="actions votes"):
        # The ids are those that the keys of the labelling page press.
        buttons = [
            gr.Button(words(f"vote_{vote}"), elem_id=f"label-{number}", interactive=False, min_width=140)
            for number, vote in enumerate(VOTES, 1)
        ]
        following = gr.Button(words("next"), variant="primary", elem_id="label-s", min_width=140)
    standing = gr.HTML(apply_default_css=False, elem_classes="shown", elem_id="blind-standing")
    outputs = [token, shown, standing, *buttons]

    def view(ballot: Ballot | None, otherwise: str, *, is_open: bool) -> list[Any]:
        body = (
            _view(page, ballot, is_open) if ballot else Markup('<div class="report">{}</div>').format(notice(otherwise))
        )
        name = ballot.token if ballot and is_open else ""
        return [name, body, _standing(page), *(gr.update(interactive=is_open) for _ in VOTES)]

    def draw(old: Any, seen: list[str], request: gr.Request) -> list[Any]:
        with sentences(words):
            key = page.ballots.key_of(old) if isinstance(old, str) else None
            seen = [*seen, key] if key else seen
            rows = page.source.recorded().rows
            different = [row for row in rows if row.before.text != row.after.text]
            ballot = page.ballots.next(different, _voter(request), set(seen))
        missing = (
            words("all_voted", count=len(different)) if different else words("all_same" if rows else "nothing_to_vote")
        )
        return [seen, *view(ballot, missing, is_open=ballot is not None)]

    def voting(choice: Vote) -> Callable[..., list[Any]]:
        def vote(old: Any, request: gr.Request) -> list[Any]:
            with sentences(words):
                ballot = page.ballots.vote(old, choice, _voter(request)) if isinstance(old, str) else None
            return view(ballot, words("vote_gone"), is_open=False)

        return vote

    blocks.load(draw, [token, skipped], [skipped, *outputs], **light(api_name=False))
    blocks.load(None, None, None, js=SHORTCUTS)
    following.click(draw, [token, skipped], [skipped, *outputs], **light(api_name="next"))
    for button, choice in zip(buttons, VOTES, strict=True):
        button.click(voting(choice), [token], outputs, **light(api_name=f"vote_{choice}"))
    if page.model is not None:
        _own_prompt(page, lambda ballot: view(ballot, "", is_open=True), outputs)


def _own_prompt(page: Page, view: Callable[[Ballot], list[Any]], outputs: list[Any]) -> None:
    """Where a visitor asks something else, whose two answers take the place of the recorded ones."""
    words = page.words
    with gr.Accordion(words("blind_own"), open=False):
        prompt = gr.Textbox(label=words("prompt"), lines=2, max_length=MAX_PROMPT_CHARACTERS, elem_id="blind-prompt")
        ask = gr.Button(words("blind_ask"), elem_id="blind-ask")

    def own(text: Any) -> list[Any]:
        with sentences(words):
            return view(_own_ballot(page, text))

    ask.click(own, [prompt], outputs, api_name="blind", concurrency_id=MODEL_QUEUE, concurrency_limit=1)


def _own_ballot(page: Page, text: Any) -> Ballot:
    """Both answers to a visitor's prompt, drawn by lot to the sides; not streamed, or their order would tell."""
    assert page.model is not None
    prompt = prompt_of(text, page.words)
    before, after = page.model(Asked(prompt, max_new_tokens=USUAL_TOKENS))
    return page.ballots.draw(prompt, before.text, after.text)


def _voter(request: gr.Request) -> str:
    """The user's name where there is one, else the browser's session; never an address."""
    return str(request.username or f"visitor {(request.session_hash or '')[:8]}")


def _view(page: Page, ballot: Ballot, is_open: bool) -> Markup:
    """The prompt and both sides; who they are only when the round is over."""
    words = page.words
    cards = []
    for side, text in (("left", ballot.left), ("right", ballot.right)):
        name = "after" if (side == "left") == ballot.is_after_left else "before"
        note, kind, facts = "", "", list[str]()
        if not is_open:
            note, kind = words(f"is_{name}"), name
            facts = facts_of_recorded(getattr(ballot.row, name), words) if ballot.row else []
        cards.append(card(words(side), note, kind, body_of(text, words), facts))
    head = Markup('<div class="report asked">{}</div>').format(block(plain(ballot.prompt), "prompt"))
    kept = Markup("") if is_open else Markup('<div class="report">{}</div>').format(notice(words("voted")))
    return head + side_by_side(*cards) + kept


def _standing(page: Page) -> Markup:
    """The win rate of all votes so far, with its interval."""
    words, tally = page.words, page.ballots.tally()
    if not tally.votes:
        return Markup(
            '<div class="report"><div class="standing card"><b>{}</b> <span class="soft">{}</span></div></div>'
        ).format(words("win_rate"), words("no_votes"))
    low, high = tally.interval
    counts = words("votes", votes=tally.votes, win=tally.win, tie=tally.tie, loss=tally.loss)
    return Markup(
        '<div class="report"><div class="standing card"><b>{}</b> <span class="rate">{:.1f} %</span>{}'
        '<span class="soft">{:.1f} % … {:.1f} % (95 %, Wilson)</span><span class="soft">{}</span>'
        '<span class="soft">{}</span></div></div>'
    ).format(
        words("win_rate"), 100 * tally.rate, interval_bar(tally.rate, low, high), 100 * low, 100 * high, counts,
        words("votes_file", file=page.ballots.pairs),
    )  # fmt: skip
