"""Measure the page: first paint, first token of an answer, and 16 visitors at once, in a real browser on this machine.

    python benchmarks/page_speed.py RUN [--rounds 5]

RUN is a finished and compared run (`python -m eval demo` makes runs/demo). Needs playwright and a Chromium. Writes
benchmarks/results/page_speed.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own folder is on the path, not the repository

from benchmarks.data_speed import RESULTS, processor  # noqa: E402
from scripts.make_screenshots import PROMPT, chromium, served  # noqa: E402

LIMITS = {"first paint": 2.0, "header shown": 2.0, "first token": 1.0}
VISITORS = 16
PAINTED = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
WRITTEN = "document.querySelector('.answer.before .text')?.innerText.trim().length > 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with served(options.run) as address, chromium() as browser:
        found = [one_visit(browser, address) for _ in range(options.rounds)]
        seconds, answered = many_visits(browser, address)
    results = {
        "processor": processor(), "load_average": load, "limits": LIMITS, "rounds": found,
        "visitors": {"at once": VISITORS, "seconds": seconds, "without_error": answered},
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "page_speed.json").write_text(json.dumps(results, indent=2) + "\n")
    (RESULTS / "page_speed.md").write_text(markdown(results))
    print(markdown(results))


def one_visit(browser: Any, address: str) -> dict[str, float]:
    """Seconds until a new visitor sees the page, and from the click until the first token of an answer stands there."""
    page = browser.new_context().new_page()
    start = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_selector("header.top")
    shown = time.perf_counter() - start
    page.wait_for_timeout(1000)
    page.fill("#compare-prompt textarea", PROMPT)
    start = time.perf_counter()
    page.click("#compare-ask")
    page.wait_for_function(WRITTEN)
    first = time.perf_counter() - start
    page.wait_for_selector(".answer.after details")
    painted = page.evaluate(PAINTED) / 1000
    page.context.close()
    return {"first paint": painted, "header shown": shown, "first token": first}


def many_visits(browser: Any, address: str) -> tuple[float, int]:
    """Seconds from the first click until all visitors, who ask at once, have both answers; and how many have them."""
    pages = [browser.new_context().new_page() for _ in range(VISITORS)]
    for page in pages:
        page.goto(address)
        page.wait_for_selector("header.top")
        page.fill("#compare-prompt textarea", PROMPT)
    start = time.perf_counter()
    for page in pages:
        page.click("#compare-ask")
    for page in pages:
        page.wait_for_selector(".answer.after details", timeout=120_000)
    return time.perf_counter() - start, sum(page.locator(".toast-wrap .error").count() == 0 for page in pages)


def markdown(results: dict[str, Any]) -> str:
    """The table of the results."""
    lines = ["# The page in a browser, on the demo's base", "", f"{results['processor']}, load average before "
             f"{results['load_average']:.1f}.", "", "| | median, s | range | limit |", "|---|---|---|---|"]  # fmt: skip
    for name, limit in results["limits"].items():
        values = [one[name] for one in results["rounds"]]
        spread = f"{min(values):.2f} to {max(values):.2f}"
        lines.append(f"| {name} | {statistics.median(values):.2f} | {spread} | {limit:.0f} |")
    visitors = results["visitors"]
    lines += [
        "",
        f"{visitors['at once']} visitors who ask at once: {visitors['without_error']} have both answers, without an "
        f"error, after {visitors['seconds']:.1f} s. The 16 browsers share "
        "the cores with the server. First token: from the click to the first text in the browser.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
