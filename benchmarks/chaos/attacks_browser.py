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

from benchmarks.chaos.attacks import Target

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "evil.example"  # which the browser takes for this machine, as after DNS rebinding
# What scripts of an evil page try: each hands back what it could read or open, or "" where nothing came of it.
SCRIPTS = {
    "read the page": "(await fetch(PAGE + '/')).text()",
    "read the configuration": "(await fetch(PAGE + '/config')).text()",
    "read a file": "(await fetch(PAGE + '/gradio_api/file=SECRET')).text()",
    "read with the visitor's cookies": "(await fetch(PAGE + '/', {credentials: 'include'})).text()",
    "take it for a script": (
        "new Promise((done) => { const made = document.createElement('script'); made.src = PAGE + '/gradio_api/info';"
        "made.onload = () => done('loaded'); made.onerror = () => done(''); document.head.append(made); })"
    ),
    "take its code": (
        "new Promise((done) => { const made = document.createElement('link'); made.rel = 'stylesheet';"
        "made.href = PAGE + '/theme.css'; made.onload = () => done('loaded'); made.onerror = () => done('');"
        "document.head.append(made); })"
    ),
    "listen to its events": (
        "new Promise((done) => { const made = new EventSource(PAGE + '/gradio_api/heartbeat/s');"
        "made.onopen = () => done('open'); made.onmessage = () => done('event'); made.onerror = () => done(''); })"
    ),
    "open a socket": (
        "new Promise((done) => { const made = new WebSocket(PAGE.replace('http', 'ws') + '/gradio_api/ws');"
        "made.onopen = () => done('open'); made.onerror = () => done(''); })"
    ),
    "show it in a frame": (
        "new Promise((done) => { const made = document.createElement('iframe'); made.src = PAGE;"
        "document.body.append(made); setTimeout(() => { try { done(made.contentDocument.body.innerText) }"
        "catch (error) { done(made.contentWindow.length ? 'frames' : '') } }, 1500); })"
    ),
    "look into its window": (
        "new Promise((done) => { const made = window.open(PAGE); setTimeout(() => {"
        "try { done(made.document.title) } catch (error) { done('') } }, 1500); })"
    ),
}
# What it sends without a look at the answer: no file may be written, nothing labelled, nobody logged out.
SENT = {
    "upload": "fetch(PAGE + '/gradio_api/upload', {method: 'POST', mode: 'no-cors', body: form(300000)})",
    "upload with cookies": (
        "fetch(PAGE + '/gradio_api/upload', {method: 'POST', mode: 'no-cors', credentials: 'include', body: form(300000)})"
    ),
    "press a button": "fetch(PAGE + '/gradio_api/queue/join', {method: 'POST', mode: 'no-cors', body: JSON.stringify(EVENT)})",
    "press a button by a beacon": "navigator.sendBeacon(PAGE + '/gradio_api/queue/join', JSON.stringify(EVENT))",
    "press a button without a type": (
        "fetch(PAGE + '/gradio_api/queue/join', {method: 'POST', mode: 'no-cors', body: new Blob([JSON.stringify(EVENT)])})"
    ),
    "press a button by a form": (
        "(() => { const made = document.createElement('form'); made.method = 'POST'; made.enctype = 'text/plain';"
        "made.action = PAGE + '/gradio_api/queue/join'; const name = document.createElement('input');"
        "name.name = JSON.stringify(EVENT).slice(0, -1) + ',\"x\":\"'; name.value = '\"}'; made.append(name);"
        "document.body.append(made); made.target = '_blank'; made.submit(); })()"
    ),
    "write the code": (
        "fetch(PAGE + '/gradio_api/vibe-code', {method: 'POST', mode: 'no-cors', body: new Blob(['{\"code\": \"1\"}'])})"
    ),
}  # fmt: skip
FORM = "const form = (size) => { const made = new FormData(); made.append('files', new Blob(['x'.repeat(size)]), 'a.bin'); return made; };"


def by_browser(target: Target) -> Iterator[tuple[str, str, list[str]]]:
    """(attack, what came of it, problems) of every attack, in one browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, _evil_site() as port:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", f"--host-resolver-rules=MAP {EVIL} 127.0.0.1"]
        )
        try:
            yield from _attacks(browser, port, target)
        finally:
            browser.close()


def _attacks(browser: Any, port: int, target: Target) -> Iterator[tuple[str, str, list[str]]]:
    at_work = browser.new_page()
    at_work.goto(f"http://localhost:{target.port}/")
    done = at_work.locator("#label-progress textarea")
    done.wait_for()
    at_work.wait_for_function("document.querySelector('#label-progress textarea').value !== ''")
    page = browser.new_page()
    rebound = page.goto(f"http://{EVIL}:{target.port}/")
    yield "point its own name here", str(rebound.status), [f"answered {rebound.status}"] * (rebound.status != 421)
    before = done.input_value()
    event = {"data": [""], "fn_index": target.event("press_u"), "session_hash": "evil"}
    for name, script in (SCRIPTS | SENT).items():
        files = target.files()
        page.goto(f"http://{EVIL}:{port}/")
        start = f"const PAGE = 'http://localhost:{target.port}'; const EVENT = {json.dumps(event)}; {FORM}"
        what = script.replace("SECRET", str(target.secret))
        got = page.evaluate(f"async () => {{ {start} try {{ return await ({what}) }} catch (error) {{ return '' }} }}")
        page.wait_for_timeout(200)
        problems = [f"it got {str(got)[:80]!r}"] * (name in SCRIPTS and bool(got))
        problems += [f"{target.files() - files} files written"] * (target.files() > files)
        if name.startswith("press"):
            problems += ["it was pressed"] * _was_pressed(target)
        yield name, "nothing" if not problems else problems[0], problems
    at_work.keyboard.press("1")
    at_work.wait_for_function(f"document.querySelector('#label-progress textarea').value !== {json.dumps(before)}")
    said = done.input_value()
    yield "the person labels on", said, [] if said.startswith("1 of") else [f"the page says {said!r}"]


def _was_pressed(target: Target) -> bool:
    """Whether an event of the evil page's session reached the queue."""
    from benchmarks.chaos.raw_http import connect, read_reply, request

    with connect(target.port) as connection:
        connection.settimeout(1)
        connection.sendall(request("GET", "/gradio_api/queue/data?session_hash=evil"))
        return b"process_completed" in read_reply(connection).body


@contextmanager
def _evil_site() -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<!doctype html><title>evil</title><body>"
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
