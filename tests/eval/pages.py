"""Pages over made-up comparisons, and how a browser shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparisons import row

from eval.answers import ANSWERS, AnswerFile, Row
from eval.page.answers import Comparison
from eval.page.build import build_page, look
from eval.page.parts import Page
from eval.page.prompts import PromptList
from eval.page.source import Source
from eval.page.votes import Ballots
from eval.page.words import Language, words_in
from qlora_dpo.pages import serving as pages
from qlora_dpo.pages.serving import Served

PATIENT = 60_000  # milliseconds: the machine may be busy


def make_comparison(folder: Path, rows: Sequence[Row] | None = None) -> Path:
    """The folder of a comparison, by default of three prompts."""
    if rows is None:
        rows = [row(number, f"before {number}", f"after {number}", category=f"c{number % 2}") for number in range(3)]
    AnswerFile(folder, {"adapter": "a"})
    with (folder / ANSWERS).open("a") as file:  # rows that hold half of a character too
        file.writelines(json.dumps(asdict(one)) + "\n" for one in rows)
    return folder


def make_page(source: Source, model: Comparison | None = None, language: Language = "en") -> Page:
    """What the tabs are made of."""
    ballots = Ballots(source.votes_folder, source.comparison)
    return Page(source, words_in(language), language, model, PromptList(source), ballots)


@contextmanager
def serving(page: Page, auth: tuple[str, str] | None = None) -> Iterator[str]:
    """The address of a page that is served."""
    with pages.serving(lambda: build_page(page), Served(auth=auth), look) as address:
        yield address


def opened(found: Any, address: str, **context: Any) -> Any:
    """A tab of the browser that shows the page."""
    page = found.new_context(**context).new_page()
    page.set_default_timeout(PATIENT)
    page.goto(address)
    page.wait_for_selector("header.top")
    return page


def open_tab(page: Any, number: int) -> None:
    """Show a tab of the page."""
    page.get_by_role("tab").nth(number).click()
