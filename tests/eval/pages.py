"""Pages over made-up comparisons, and a browser to look at them."""

from __future__ import annotations

import gc
import json
import os
import shutil
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from comparisons import row

from eval.answers import ANSWERS, AnswerFile, Row
from eval.app import launch
from eval.page.answers import Comparison
from eval.page.build import build_page
from eval.page.parts import Page
from eval.page.prompts import PromptList
from eval.page.source import Source
from eval.page.votes import Ballots
from eval.page.words import Language, words_in

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
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
    blocks = build_page(page)
    try:
        yield launch(blocks, host="127.0.0.1", port=0, auth=auth).rstrip("/")
    finally:
        blocks.close(verbose=False)
        del blocks
        gc.collect()  # what Gradio leaves open is noticed here, where it is expected, and not when pytest ends


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (CHROMIUM names one)")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield found
        finally:
            found.close()


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


class Client:
    """A visitor without a browser."""

    def __init__(self, address: str, session: str) -> None:
        self.address, self.session = address, session
        with urllib.request.urlopen(f"{address}/config", timeout=60) as response:
            self._events = {one["api_name"]: one["id"] for one in json.load(response)["dependencies"]}

    def join(self, name: str, *values: Any) -> dict[str, Any]:
        """Queue an event; what the server says about it."""
        body = {"data": list(values), "fn_index": self._events[name], "session_hash": self.session}
        with urllib.request.urlopen(self._request("queue/join", body), timeout=60) as response:
            return dict(json.load(response))

    def events(self) -> Iterator[dict[str, Any]]:
        """What happens to it."""
        address = f"{self.address}/gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(address, timeout=120) as lines:
            for line in lines:
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    yield event
                    if event["msg"] == "process_completed":
                        return

    def ask(self, name: str, *values: Any) -> dict[str, Any]:
        """Queue an event and wait for its end."""
        self.join(name, *values)
        *_, last = self.events()
        return last

    def _request(self, route: str, body: dict[str, Any]) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        return urllib.request.Request(f"{self.address}/gradio_api/{route}", json.dumps(body).encode(), headers)
