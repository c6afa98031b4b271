"""The page in a real browser: compare, vote, curves, recorded answers, passwords, hostile texts, many visitors."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import row
from pages import make_comparison, make_page, open_tab, opened, serving
from payloads import PAYLOADS
from report_runs import long_run, make_run
from tiny import tiny_model, tiny_tokenizer, with_lora
from visitors import Client, browser

from eval.page.answers import Comparison
from eval.page.limits import MAX_PROMPT_CHARACTERS
from eval.page.source import Source, recorded_source
from qlora_dpo.labeling.records import load_candidates
from qlora_dpo.pages.guard import POLICY
from qlora_dpo.pages.waiting import OF_ONE_ADDRESS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


class Slow:
    """A model whose tokens can be held back, and that counts them."""

    def __init__(self) -> None:
        self.model = with_lora(tiny_model(), r=8)
        self.comparison = Comparison(self.model, tiny_tokenizer(), longest_answer=60)
        self.seconds, self.steps = 0.0, 0
        generate = self.model.generate

        def slow(*arguments: Any, stopping_criteria: Any, **more: Any) -> Any:
            def wait(ids: Any, scores: Any, **_: Any) -> Any:
                time.sleep(self.seconds)
                self.steps += 1
                return torch.zeros(len(ids), dtype=torch.bool)

            stopping_criteria.append(wait)
            return generate(*arguments, stopping_criteria=stopping_criteria, **more)

        self.model.generate = slow


@pytest.fixture(scope="module")
def slow() -> Slow:
    return Slow()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run still going on, whose comparison has rows that try to become a part of the page."""
    folder = make_run(
        tmp_path_factory.mktemp("runs") / "my-run", long_run(30), status={"status": "running", "total_steps": 40}
    )
    bad = [
        row(number, payload, f"{payload} after", prompt=payload, category="xss", reference_answer=payload)
        for number, payload in enumerate(PAYLOADS)
    ]
    make_comparison(folder / "compare", bad)
    return folder


@pytest.fixture(scope="module")
def address(run: Path, slow: Slow) -> Iterator[str]:
    source = Source(run=run, comparison=run / "compare", adapter=run)
    with serving(make_page(source, slow.comparison)) as served:
        yield served


def test_compare(found: Any, address: str) -> None:
    page = opened(found, address)
    page.fill("#compare-prompt textarea", "w7 w8")
    page.click("#compare-ask")
    page.wait_for_selector(".answer.after details")
    before, after = (page.locator(f".answer.{side} > .text").inner_text() for side in ("before", "after"))
    assert before != after and before.startswith("w") and after.startswith("w")
    assert page.locator(".heat span").count() > 10
    assert "log-ratio" in page.locator(".heat span").first.get_attribute("title")
    assert re.search(r"\d+ tokens", page.locator(".answer.after .said").inner_text())
    page.fill("#compare-prompt textarea", " ")
    page.click("#compare-ask")
    page.wait_for_selector("text=Write a prompt first.")


def test_a_visitor_who_leaves_ends_the_writing(found: Any, address: str, slow: Slow) -> None:
    page = opened(found, address)
    slow.seconds, slow.steps = 0.2, 0
    try:
        page.fill("#compare-prompt textarea", "w7 w8")
        page.click("#compare-ask")
        page.wait_for_selector(".answer.before .said span")
        assert "writing" in page.locator("#compare-answers").inner_html()
        page.context.close()
        deadline = time.monotonic() + 30
        steps = -1
        while steps != slow.steps and time.monotonic() < deadline:
            steps = slow.steps
            time.sleep(1.0)
        assert steps == slow.steps < 110  # of 120, had nobody left
    finally:
        slow.seconds = 0.0


def test_hostile_texts_stay_texts(found: Any, address: str) -> None:
    context = found.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    elsewhere: list[str] = []
    context.on("request", lambda request: elsewhere.append(request.url) if "evil" in request.url else None)
    page.on("dialog", lambda dialog: elsewhere.append(dialog.message) or dialog.dismiss())
    page.goto(address)
    page.wait_for_selector("header.top")
    open_tab(page, 1)
    page.wait_for_selector("#blind-answers .answer")
    open_tab(page, 2)
    seen = ""
    for place in range((len(PAYLOADS) + 9) // 10):
        page.wait_for_selector(f"text={10 * place + 1}–")
        seen += page.locator("#samples-rows").inner_text()
        assert (
            page.locator("#samples-rows :is(script, img, iframe, object, embed, input, video, a, style, base)").count()
            == 0
        )
        if place < (len(PAYLOADS) - 1) // 10:
            page.click("#samples-next")
    assert seen.count("alert(1)") > 60
    open_tab(page, 0)
    for payload in ("<img src=x onerror=alert(1)>", "</div><script>alert(1)</script>"):
        page.fill("#compare-prompt textarea", payload)
        page.click("#compare-ask")
        page.wait_for_selector(".answer.after details")
    page.wait_for_timeout(300)
    assert elsewhere == []
    assert page.evaluate("document.querySelectorAll('[onerror], [onload], [onmouseover], [onfocus]').length") == 0


def test_votes(found: Any, address: str, run: Path) -> None:
    page = opened(found, address)
    open_tab(page, 1)
    page.wait_for_selector("#blind-answers .answer")
    assert "adapter" not in page.locator("#blind-answers").inner_text()
    page.wait_for_selector("#label-1:not([disabled])")
    page.keyboard.press("1")
    page.wait_for_selector("#blind-answers >> text=adapter on")
    assert page.locator("#label-1").is_disabled()
    assert "1 votes" in page.locator("#blind-standing").inner_text()
    assert "Wilson" in page.locator("#blind-standing").inner_text()
    page.keyboard.press("s")
    page.wait_for_selector("#label-3:not([disabled])")
    assert "adapter" not in page.locator("#blind-answers").inner_text()
    page.click("#label-3")
    page.wait_for_selector("#blind-standing >> text=2 votes")
    assert len(load_candidates(str(run / "compare" / "votes.jsonl"))) == 1
    page.keyboard.press("s")
    page.wait_for_selector("#label-1:not([disabled])")
    open_tab(page, 0)  # where keys do not vote
    page.locator("header.top").click()
    page.keyboard.press("1")
    open_tab(page, 1)
    page.wait_for_timeout(300)
    assert "2 votes" in page.locator("#blind-standing").inner_text()


def test_live_curves(found: Any, address: str, run: Path) -> None:
    page = opened(found, address)
    open_tab(page, 3)
    page.wait_for_selector("#training figure.chart svg")
    charts = page.locator("#training figure.chart").count()
    assert charts > 5
    page.wait_for_timeout(400)
    page.locator("#training figure.chart svg").first.hover()
    page.wait_for_function("document.querySelector('#training .legend .at').textContent !== ''")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 39, "loss": 0.0625, "grad_norm": 1.0}) + "\n")
    page.wait_for_selector("#training td:text-is('0.0625')", timeout=60_000)
    assert page.locator("#training figure.chart").count() == charts


@pytest.mark.parametrize("language", ["en", "zh"])
def test_recorded_answers_need_no_model(found: Any, tmp_path: Path, language: Any) -> None:
    rows = [row(1, "old", "=new", category="math", prompt="你好？"), row(2, "x", "y", category="talk")]
    page_ = make_page(recorded_source(make_comparison(tmp_path / "c", rows)), language=language)
    with serving(page_) as served:
        page = opened(found, served, color_scheme="dark", viewport={"width": 390, "height": 800})
        page.wait_for_selector(".answer.after")
        assert "=new" in page.locator("#compare-answers").inner_text()
        assert page.locator("#compare-ask").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        open_tab(page, 2)
        page.wait_for_selector("#samples-rows article")
        page.fill("#samples-search input, #samples-search textarea", "old")
        page.wait_for_function("document.querySelectorAll('#samples-rows article').length === 1")
        with page.expect_download() as saved:
            page.click("#samples-csv")
        assert "'=new" in Path(saved.value.path()).read_text()
        assert ("对比" in page.locator("[role=tablist]").first.inner_text()) == (language == "zh")


def test_a_password_is_asked_for(found: Any, tmp_path: Path) -> None:
    page_ = make_page(recorded_source(make_comparison(tmp_path / "c")))
    with serving(page_, auth=("ann", "long-secret")) as served:
        for path in ("/gradio_api/queue/data?session_hash=s",):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(served + path, timeout=30)
            assert error.value.code == 401
            error.value.close()
        page = found.new_context().new_page()
        page.set_default_timeout(60_000)
        page.goto(served)
        page.wait_for_selector("input[type=password]")
        assert page.locator("header.top").count() == 0
        page.locator("input").first.fill("ann")
        page.locator("input[type=password]").fill("long-secret")
        page.get_by_role("button").first.click()
        page.wait_for_selector("header.top")


def test_no_route_reads_a_file(address: str, run: Path) -> None:
    targets = (
        "/etc/passwd",
        "../../../../etc/passwd",
        str(run / "config.yaml"),
        "%2e%2e/%2e%2e/etc/passwd",
        "..%5c..%5cx",
    )
    routes = (
        "gradio_api/file=",
        "file=",
        "gradio_api/file/",
        "static/",
        "assets/",
        "svelte/",
        "gradio_api/proxy=http://x/",
    )
    for route in routes:
        for target in targets:
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(f"{address}/{route}{target}", timeout=30)
            assert error.value.code == 404, (route, target)
            assert b"root:" not in error.value.read()
            error.value.close()
    with urllib.request.urlopen(address, timeout=30) as response:
        assert response.headers["content-security-policy"] == POLICY


def test_limits_hold_without_a_browser(address: str) -> None:
    client = Client(address, "limits")
    event = client.ask("compare", "w" * 100_000, 8, 0, 0)
    assert not event["success"] and str(f"{MAX_PROMPT_CHARACTERS:,}") in event["output"]["error"]
    for prompt in ("", "\ud83d", "   "):
        assert not client.ask("compare", prompt, 8, 0, 0)["success"]
    for prompt in ("🎉 你好", "\x00\x07\x1b[31m", "w7 " * 2600):
        assert client.ask("compare", prompt, 2, 0, 0)["success"]
    with pytest.raises(urllib.error.HTTPError) as error:
        client.join("compare", "w" * 12_000_000, 8, 0, 0)  # more than a socket's buffers hold
    assert error.value.code == 413
    error.value.close()


def test_sixteen_visitors_wait_their_turn_and_one_more_is_told(address: str, slow: Slow) -> None:
    slow.seconds = 0.02
    clients = [Client(address, f"visitor{number}") for number in range(OF_ONE_ADDRESS)]
    ended: list[bool] = []

    def visit(client: Client) -> None:
        ended.append(client.ask("compare", "w7 w8", 4, 0, 0)["success"])

    threads = [threading.Thread(target=visit, args=(client,)) for client in clients]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert ended == [True] * OF_ONE_ADDRESS
        slow.seconds = 0.5
        crowd = [Client(address, f"crowd{number}") for number in range(OF_ONE_ADDRESS + 3)]
        told = []
        for client in crowd:
            try:
                client.join("compare", "w7", 20, 0, 0)
            except urllib.error.HTTPError as error:
                told.append((error.code, error.read().decode()))
                error.close()
        assert told and all(code == 503 and "queue" in text.lower() for code, text in told)
    finally:
        slow.seconds = 0.0
