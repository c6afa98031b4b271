"""Make the pictures of the page and the report for README and docs, from a finished and compared run.

    python -m eval demo && python scripts/make_screenshots.py [RUN] [--output FOLDER] [--all]

Needs playwright (requirements-dev.txt) and a Chromium; CHROMIUM names it where it is not on the path. With --all every
tab in light and dark, on a desk and on a phone, to be looked at.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PORT = 7899
TABS = {
    "compare": "Compare", "blind": "Blind A/B", "samples": "Samples", "training": "Training", "data": "Data",
    "release": "Release",
}  # fmt: skip
SIZES = {"desk": {"width": 1180, "height": 860}, "phone": {"width": 390, "height": 844}}
PROMPT = "Which city is the capital of Peru?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with served(options.run) as address, chromium() as browser:
        for scheme in ("light", "dark") if options.all else ("light",):
            for size in SIZES if options.all else ("desk",):
                context = browser.new_context(color_scheme=scheme, viewport=SIZES[size])
                suffix = f"_{scheme}_{size}" if options.all else ""
                of_page(context.new_page(), address, options.output, suffix)
        report = options.run.resolve() / "report.html"
        subprocess.run([sys.executable, "-m", "eval", "report", str(options.run)], check=True)
        for scheme in ("light", "dark"):
            page = browser.new_context(color_scheme=scheme, viewport={"width": 1180, "height": 1100}).new_page()
            page.goto(report.as_uri())
            page.screenshot(path=options.output / f"report_{scheme}.png")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"), args=["--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of the page of a run."""
    address = f"http://127.0.0.1:{PORT}"
    words = ["-m", "eval", "app", "--adapter", str(run), "--port", str(PORT), "--language", "en", "--use_cpu", "true"]
    server = subprocess.Popen([sys.executable, *words])
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(address, timeout=1).close()
                break
            except (urllib.error.URLError, TimeoutError):
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def of_page(page: Any, address: str, folder: Path, suffix: str) -> None:
    """One picture a tab, whole where it is to be looked at; the blind tab after a vote."""
    page.goto(address)
    page.wait_for_selector("header.top")
    for name in TABS:
        show_tab(page, TABS[name])
        if name == "compare":
            page.fill("#compare-prompt textarea", PROMPT)
            page.click("#compare-ask")
            page.wait_for_selector(".answer.after details", timeout=60_000)
        if name == "blind":
            page.wait_for_selector("#label-1:not([disabled])")
            page.keyboard.press("1")
            page.wait_for_selector("#blind-answers >> text=adapter on")
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"app_{name}{suffix}.png", full_page=bool(suffix))


def show_tab(page: Any, title: str) -> None:
    """Show a tab, on a narrow screen from the menu of those that have no room."""
    if page.get_by_role("tab", name=title, exact=True).count():
        page.get_by_role("tab", name=title, exact=True).click()
    else:
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=title).click()


if __name__ == "__main__":
    main()
