"""Visitors of a page: what it says about itself, events without a browser, and a browser."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def config_of(address: str) -> dict[str, Any]:
    """What the page says about itself."""
    with urllib.request.urlopen(address, timeout=60) as response:
        text = response.read().decode()
    config: dict[str, Any] = json.JSONDecoder().raw_decode(text.partition("window.gradio_config = ")[2])[0]
    return config


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


class Client:
    """A visitor without a browser."""

    def __init__(self, address: str, session: str) -> None:
        self.address, self.session = address, session
        self._events = {one["api_name"]: one["id"] for one in config_of(address)["dependencies"]}

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
