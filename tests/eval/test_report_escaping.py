"""Nothing that a model, a data file or a name says becomes a part of the page: by its structure, and in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from payloads import PAYLOADS
from report_runs import SUMMARY, add_comparison, answer, make_run, row

from eval.answers import Row
from eval.report.page import page_of
from eval.report.run import Comparison, Run, read_run
from eval.report.words import Language

TAGS = set(
    "html head meta title style body main header p div h1 h2 h3 h4 span dl dt dd nav a section b code figure "
    "figcaption ul "
    "li i svg line text path polygon circle rect table tr th td article details summary br footer script".split()
)
ATTRIBUTES = set(
    "lang charset http-equiv content name class id href viewbox role tabindex aria-label aria-live aria-hidden "
    "data-steps "
    "data-lines x y x1 x2 y1 y2 cx cy r d points width height visibility text-anchor dir open".split()
)
CHROMIUM = Path("/usr/bin/chromium")


class Structure(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.inline: dict[str, str] = {}
        self.text = ""
        self.open = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open in {"style", "script"}:
            self.inline[self.open] = data
        else:
            self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def hostile_run(folder: Path, payload: str, *, all_of_them: tuple[str, ...] = ()) -> Run:
    """A run in which every text is the payload; the comparison has all of them."""
    clean = payload.replace("/", "\N{FRACTION SLASH}").replace("\x00", "").replace("\ud83d", "")
    text = json.loads(json.dumps(payload))
    metrics = row(2, -0.4, -0.9) | {
        f"{prefix}{name}/{text}": 1.0 for prefix in ("", "eval_") for name in ("count", "loss", "rewards/accuracies")
    }
    status: dict[str, Any] = {
        "status": "finished", "total_steps": 2, "changed": [{"step": text, "name": text, "was": text, "now": text}],
        "environment": {"gpus": [text], "cores": text, "memory_gib": text, text: text},
    }  # fmt: skip
    readable = "".join(one for one in text if one.isprintable())
    config = {"model_name_or_path": readable, "dataset": readable, "reference_model": readable, "loss_type": [readable]}
    run = make_run(folder / clean, [row(1, 0.0, 0.0), metrics], config=config | {readable: readable}, status=status)
    texts = [*(all_of_them or (text,))]
    (run / ".lock").write_text(json.dumps({"pid": 0, "host": text, "since": text}))
    samples = [{"step": step, "prompt": one, "before": one, "after": one} for one in texts for step in (text, 2)]
    (run / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    demo = {"answers": [{"prompt": one, "before": one, "after": one, "category": one} for one in texts], text: 3}
    (run / "before_after.json").write_text(json.dumps(demo))
    (run / "merge_report.json").write_text(json.dumps({text: text, "t": [{text: text}], "u": {text: {text: text}}}))
    source = {"source": text, "dataset_format": text, "rows_read": 3, "refused": {text: 2}}
    lint = {"rules": {text: {"count": text, "advice": text, "blocks": True}}}
    (run / "data.json").write_text(json.dumps({"sources": [source], "lint": lint, "train": text, "held_out": text}))
    add_comparison(run / "compare", [])
    lines = [{"settings": {}}]
    for number, one in enumerate(texts):
        both = {"before": answer(one), "after": answer(one) | {"finish_reason": one}}
        lines.append(
            {"id": f"{number}", "prompt": [{"role": one, "content": one}], "category": one, "reference_answer": one,
             "origin": one, "seed": 1, **both}
        )  # fmt: skip
    (run / "compare" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "compare" / "verdicts.jsonl").write_text(json.dumps({"id": "0", "method": text, "winner": "after"}) + "\n")
    verdict = {"win": text, "win_rate": 0.5, "interval": [0.4, 0.6], "by_category": {text: {"win": text}}}
    summary = SUMMARY | {"verdicts": {text: verdict}, "rates": {"before": {text: text}}, "kl": {"mean": text}}
    (run / "compare" / "summary.json").write_text(json.dumps(summary | {"prompts": text, "seconds": text}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write("broken\n" + json.dumps(row(3, 0.0, 0.0)) + "\n")
    return read_run(run)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_payload_stays_text_wherever_it_stands(tmp_path: Path, payload: str) -> None:
    run = hostile_run(tmp_path, payload)
    assert run.comparison is not None and isinstance(run.comparison, Comparison)
    assert isinstance(run.comparison.rows[0], Row), run.notes
    languages: tuple[Language, ...] = ("en", "zh")
    for language in languages:
        page = page_of(run, language=language)
        page.encode()  # no halves of surrogate pairs
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page)
        found = Structure(page)
        assert set(found.tags) <= TAGS
        assert {name for name, _ in found.attributes} <= ATTRIBUTES
        assert all(value.startswith("#") for name, value in found.attributes if name in {"href", "src"})
        assert (found.tags.count("script"), found.tags.count("style"), found.tags.count("title")) == (1, 1, 1)
        shown = re.sub("[\x00-\x1f\u202e\ud83d]", "\N{REPLACEMENT CHARACTER}", payload)
        assert found.text.count(shown) >= 20, "it is shown, as text"
        assert "60481729" not in found.text


def test_only_the_page_s_own_script_and_style_may_run(tmp_path: Path) -> None:
    found = Structure(page_of(hostile_run(tmp_path, PAYLOADS[0])))
    policy = next(value for name, value in found.attributes if name == "content" and "default-src" in value)
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found.inline[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def test_long_texts_are_cut_and_this_is_said(tmp_path: Path) -> None:
    run = hostile_run(tmp_path, "<b>", all_of_them=("a" * 100_000,))
    page = page_of(run)
    assert len(page) < 120_000 and "… 98,500 more characters" in page


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.is_file(), reason="there is no /usr/bin/chromium")
def test_page_in_a_browser(tmp_path: Path) -> None:
    """All payloads in one page: nothing runs, nothing is fetched, the charts answer the pointer, a phone has no side
    scrolling."""
    playwright = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "report.html"
    run = hostile_run(tmp_path, PAYLOADS[0], all_of_them=PAYLOADS)
    file.write_text(page_of(run), encoding="utf-8")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        happened: list[str] = []
        page.on("dialog", lambda dialog: (happened.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda message: happened.append(message.text))
        page.on("pageerror", lambda error: happened.append(str(error)))
        page.on("request", lambda request: happened.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        before = page.inner_text("#chart-rewards .legend")
        chart = page.locator("#chart-rewards svg")
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 40)
        assert page.inner_text("#chart-rewards .at") == "1"
        assert page.inner_text("#chart-rewards .legend") != before
        page.mouse.move(0, 0)
        chart.press("ArrowLeft")
        assert page.inner_text("#chart-rewards .at") == "2"
        page.click("#why a")
        assert page.evaluate("location.hash").startswith("#setting-")
        for one in page.locator("a[href]").all():
            assert one.get_attribute("href").startswith("#")
        browser.close()
    assert happened == []
