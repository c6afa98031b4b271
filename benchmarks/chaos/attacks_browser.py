"""Attacks on the pages by other websites, in a real browser: an evil page is opened while somebody labels."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote

from benchmarks.chaos.attack import Target
from benchmarks.chaos.raw_http import connect, read_reply, request
from qlora_dpo.pages.guard import REFUSALS

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "evil.example"  # which the browser takes for this machine, as after DNS rebinding
# What the scripts of a page try: each hands back what it could read or open, or "" where nothing came of it.
READ = {
    "read the page": "(await fetch(PAGE + '/')).text()",
    "read the configuration": "(await fetch(PAGE + '/config')).text()",
    "read a file": "(await fetch(PAGE + '/gradio_api/file=SECRET')).text()",
}
LISTEN = (
    "new Promise((done) => { const made = new EventSource(PAGE + '/gradio_api/heartbeat/s');"
    "made.onopen = () => done('open'); made.onerror = () => done(''); })"
)
LOAD = (
    "new Promise((done) => { const made = document.createElement('%s'); made.onload = () => done('loaded');"
    "made.onerror = () => done(''); made.rel = 'stylesheet'; made.%s = PAGE + '%s'; document.body.append(made); })"
)
UPLOAD = (
    "fetch(PAGE + '/gradio_api/upload', {method: 'POST', mode: 'no-cors', credentials: 'include', body: FORM()})"
    ".then(() => '')"
)
PRESS = (
    "fetch(PAGE + '/gradio_api/queue/join', {method: 'POST', headers: {'content-type': 'application/json'},"
    "body: JSON.stringify(EVENT)}).then(() => '')"
)
FRAME = (
    "new Promise((done) => { const made = document.createElement('iframe'); made.src = PAGE;"
    "made.onload = () => done(''); document.body.append(made); })"
)
# (where the page with the script comes from, what it tries)
SCRIPTS = {
    "another site": {
        "upload": UPLOAD,
        "upload by a beacon": "navigator.sendBeacon(PAGE + '/gradio_api/upload', FORM()) && ''",
        "take its style": LOAD % ("link", "href", "/theme.css"),
        "take its code": LOAD % ("script", "src", "/static/js/iframeResizer.contentWindow.min.js"),
        "show it in a frame": FRAME,
    },
    "another page of this machine": READ | {"upload": UPLOAD, "press a button": PRESS, "listen": LISTEN},
    "a name that points here": READ | {"upload": UPLOAD, "press a button": PRESS, "listen": LISTEN},
}
FORM = (
    "() => { const made = new FormData(); made.append('files', new Blob(['x']), Math.random() + '.bin'); return made; }"
)
BODY = "<!doctype html><title>evil</title><body>"


def by_browser(target: Target) -> Iterator[tuple[str, str, list[str]]]:
    """(attack, what came of it, problems) of every attack, in one browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, _evil_site() as port:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                f"--host-resolver-rules=MAP {EVIL} 127.0.0.1",
                "--disable-features=LocalNetworkAccessChecks",  # which not every browser has
            ],
        )
        try:
            yield from _attacks(browser, port, target)
        finally:
            browser.close()


def _attacks(browser: Any, port: int, target: Target) -> Iterator[tuple[str, str, list[str]]]:
    places = {
        "another site": f"http://{EVIL}:{port}/",
        "another page of this machine": f"http://localhost:{port}/",
        "a name that points here": f"http://{EVIL}:{target.port}/evil",
    }
    page = browser.new_page()
    page.route(
        "**/evil", lambda route: route.fulfill(body=BODY, content_type="text/html")
    )  # what it was before it moved
    number = target.event("press_u")
    for place, scripts in SCRIPTS.items():
        for name, script in scripts.items():
            page.goto(places[place])
            host = EVIL if place == "a name that points here" else "localhost"
            event = {"data": [""], "fn_index": number, "session_hash": f"{place} {name}"}
            files, problems = target.files(), []
            names = f"const PAGE = 'http://{host}:{target.port}', EVENT = {json.dumps(event)}, FORM = {FORM};"
            what = script.replace("SECRET", str(target.secret))
            got = page.evaluate(
                f"async () => {{ {names} try {{ return await ({what}) }} catch (error) {{ return '' }} }}"
            )
            page.wait_for_timeout(200)
            if got and not any(text in got for text in REFUSALS.values()):
                problems.append(f"it got {str(got)[:60]!r}")
            problems += ["files were written"] * (target.files() > files)
            problems += ["it was pressed"] * (script == PRESS and _was_pressed(target, str(event["session_hash"])))
            problems += ["it was shown"] * any(frame.query_selector("gradio-app") for frame in page.frames)
            yield f"{name}, from {place}", problems[0] if problems else "nothing", problems


def _was_pressed(target: Target, session: str) -> bool:
    """Whether an event of a session reached the queue."""
    with connect(target.port) as connection:
        connection.settimeout(1)
        connection.sendall(request("GET", f"/gradio_api/queue/data?session_hash={quote(session)}"))
        return b"process_completed" in read_reply(connection).body


class _Evil(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(BODY.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _evil_site() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Evil)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
