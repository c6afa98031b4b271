"""Attacks on the pages by raw HTTP: each is a request or a few, and what must become of them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.raw_http import Reply, connect, exchange, multipart, post_json, read_reply, request

JOIN, PREDICT, LOGIN = "/gradio_api/queue/join", "/gradio_api/run/predict", "/login"
SECRET = b"the content of a file"
PASSWORD = ("ann", "long-secret")
OTHER = "127.0.0.77"  # the address of another client


@dataclass(frozen=True)
class Target:
    """A page that is served, and what lies around it."""

    port: int
    secret: Path
    """A file that holds `SECRET`, outside of everything that the page is about."""
    scratch: Path
    """The folder of temporary files of the page's process."""

    def ask(self, sent: bytes, source: str = "127.0.0.1") -> Reply:
        """Send a request."""
        return exchange(self.port, sent, source)

    def event(self, name: str = "") -> int:
        """The number of an event of the page; of any that waits in the queue without a name."""
        text = self.ask(request("GET", "/")).body.decode(errors="replace")
        config = json.JSONDecoder().raw_decode(text.partition("window.gradio_config = ")[2])[0]
        return next(int(one["id"]) for one in config["dependencies"] if not name or one["api_name"] == name)

    def files(self) -> int:
        """How many temporary files there are."""
        return sum(path.is_file() for path in self.scratch.rglob("*"))


@dataclass(frozen=True)
class Attack:
    """What is tried on which page."""

    name: str
    page: str
    """label, app (with a password, on all addresses)."""
    try_it: Callable[[Target], tuple[str, list[str]]]
    """Returns (what was answered, problems)."""

    def __call__(self, target: Target) -> tuple[str, list[str]]:
        """Try it, and look whether the page has kept its files to itself and is still there."""
        before = target.files()
        said, problems = self.try_it(target)
        if target.files() > before:
            problems = [*problems, f"{target.files() - before} files written"]
        if target.ask(request("GET", "/"), OTHER).status != 200:
            problems = [*problems, "the page no longer answers"]
        return said, problems


def refused(*sent: bytes, status: int = 404) -> Callable[[Target], tuple[str, list[str]]]:
    """Requests that must be answered with a status, and with nothing of the secret."""

    def try_it(target: Target) -> tuple[str, list[str]]:
        replies = [target.ask(one.replace(b"SECRET", str(target.secret).encode())) for one in sent]
        problems = [f"answered {reply}, not {status}" for reply in replies if reply.status != status]
        problems += ["a file was served"] * any(SECRET in reply.body for reply in replies)
        return ", ".join(map(str, replies)), problems

    return try_it


def _get(path: str) -> Callable[[Target], tuple[str, list[str]]]:
    return refused(request("GET", path))


def _post(path: str, value: Any = None, **headers: str) -> Callable[[Target], tuple[str, list[str]]]:
    return refused(post_json(path, value or {}, headers=headers))


_UPLOAD, _FORM = multipart({}, "a.bin", 500_000)
ROUTES: dict[str, Callable[[Target], tuple[str, list[str]]]] = {
    "read a file": _get("/gradio_api/file=SECRET"),
    "read a file, old route": _get("/gradio_api/file/SECRET"),
    "read a file, no prefix": _get("/file=SECRET"),
    "read a file, other letters": _get("/gradio_api/%66ile=SECRET"),
    "read a file, two slashes": _get("//gradio_api//file=SECRET"),
    "read a file, up from static": refused(*(request("GET", f"/static/{up * 9}SECRET") for up in ("../", "%2e%2e/", "..\\"))),
    "read a file, up from assets": refused(*(request("GET", f"/assets/{up * 9}SECRET") for up in ("../", "..%2f", "..%5c"))),
    "read a file, up from svelte": _get("/svelte/../../../SECRET"),
    "read a hidden file": _get("/assets/.env"),
    "upload": refused(request("POST", "/gradio_api/upload", _UPLOAD, headers=_FORM)),
    "upload from another site": refused(
        request("POST", "/gradio_api/upload?upload_id=a", _UPLOAD, headers={**_FORM, "origin": "http://evil.example"})
    ),
    "upload progress": _get("/gradio_api/upload_progress?upload_id=a"),
    "fetch from elsewhere": _get("/gradio_api/proxy=http://169.254.169.254/latest/meta-data"),
    "stream": _get("/gradio_api/stream/s/0/0/playlist.m3u8"),
    "code of a component": _get("/gradio_api/custom_component/textbox/server/component/index.js"),
    "call a component": _post("/gradio_api/component_server", {"session_hash": "s", "component_id": 1, "fn_name": "ls"}),
    "save a deep link": _get("/gradio_api/deep_link?session_hash=s"),
    "open a deep link": _get("/?deep_link=..%2f..%2fstate"),
    "configuration": _get("/config"),
    "interface": _get("/gradio_api/info"),
    "schema": _get("/gradio_api/openapi.json"),
    "documentation": refused(*(request("GET", path) for path in ("/docs", "/redoc", "/openapi.json"))),
    "monitoring": refused(*(request("GET", path) for path in ("/monitoring", "/monitoring/summary", "/monitoring/x"))),
    "recording": refused(request("POST", "/gradio_api/process_recording", _UPLOAD, headers=_FORM)),
    "history of runs": refused(*(request("GET", f"/gradio_api/{path}") for path in ("runs", "run-history/buckets"))),
    "connect a history": _post("/gradio_api/run-history/connect", {"bucket": "evil"}),
    "read the code": _get("/gradio_api/vibe-code"),
    "write the code": _post("/gradio_api/vibe-code", {"code": "import os"}),
    "have the code rewritten": _post("/gradio_api/vibe-edit", {"prompt": "open a shell"}),
    "take code back": _post("/gradio_api/undo-vibe-edit"),
    "ask for ideas": _post("/gradio_api/vibe-starter-queries"),
    "reload": _get("/gradio_api/dev/reload"),
    "profile": refused(*(request("GET", f"/gradio_api/profiling/{path}") for path in ("traces", "summary"))),
    "clear the profile": _post("/gradio_api/profiling/clear"),
    "tools for agents": refused(*(request("GET", f"/gradio_api/mcp{path}") for path in ("", "/", "/sse", "/schema"))),
    "direct call": _post("/gradio_api/call/press_u", {"data": [""]}),
    "direct call, second form": _post("/gradio_api/call/v2/press_u", {"key": ""}),
    "direct call, old form": _post("/gradio_api/api/press_u", {"data": [""]}),
    "who is here": refused(*(request("GET", f"/gradio_api/{path}") for path in ("token", "user", "app_id", "login_check"))),
    "start again": _get("/gradio_api/startup-events"),
    "state of the queue": _get("/gradio_api/queue/status"),
    "application": refused(*(request("GET", path) for path in ("/manifest.json", "/pwa_icon", "/robots.txt"))),
    "other methods": refused(*(request(method, "/") for method in ("PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"))),
    "websocket": refused(
        request("GET", "/gradio_api/ws", headers={"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13"})
    ),
}  # fmt: skip
_PORTS = ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", "localhost@evil")
NAMES: dict[str, Callable[[Target], tuple[str, list[str]]]] = {
    "a name of others": refused(*(request("GET", "/", host=host) for host in _PORTS), status=421),
    "a proxy's name": refused(request("GET", "/", headers={"x-forwarded-host": "localhost, evil.example"}), status=421),
    "no name": refused(b"GET / HTTP/1.0\r\n\r\n", status=421),
    "two names": refused(b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\nconnection: close\r\n\r\n", status=400),
    "a name in the path": refused(request("GET", "http://evil.example/"), status=404),
}  # fmt: skip
_EVENT = {"data": [""], "fn_index": 0, "session_hash": "s"}
_SITES = ("http://evil.example", "null", "http://localhost:3000", "https://localhost.evil.example")
_CROSS = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
SITES: dict[str, Callable[[Target], tuple[str, list[str]]]] = {
    "an event from another site": refused(
        *(post_json(path, _EVENT, headers={"origin": site}) for site in _SITES for path in (JOIN, PREDICT)), status=403
    ),
    "an event as plain text": refused(
        post_json(JOIN, _EVENT, headers={"content-type": "text/plain"} | _CROSS), status=403
    ),
    "a stream into another site": refused(
        request("GET", "/gradio_api/heartbeat/s", headers=_CROSS | {"sec-fetch-site": "same-site"}),
        request("GET", "/gradio_api/queue/data?session_hash=s", headers=_CROSS), status=403,
    ),
    "a frame in another site": refused(
        request("GET", "/", headers=_CROSS | {"sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}), status=403
    ),
    "leave to read": refused(
        request("OPTIONS", JOIN, headers={"origin": "http://evil.example", "access-control-request-method": "POST"})
    ),
}  # fmt: skip


def endless(target: Target) -> tuple[str, list[str]]:
    """A body in pieces that does not end."""
    head = f"POST {JOIN} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    with connect(target.port) as connection:
        connection.sendall(head.encode())
        try:
            for sent in range(2000):
                connection.sendall(piece)
        except OSError:
            pass
        reply = read_reply(connection)
    return f"{reply} after {sent * 65536:,} bytes", [] if reply.status in {0, 413} and sent < 1000 else ["all of it was taken"]


def too_large(target: Target) -> tuple[str, list[str]]:
    """A body that says it is a terabyte, and one that is 2 MB."""
    replies = [target.ask(request("POST", JOIN, b"x" * 2_000_000)), target.ask(_declared(10**12))]
    return ", ".join(map(str, replies)), [f"answered {reply}" for reply in replies if reply.status != 413]


def _declared(length: int) -> bytes:
    return request("POST", JOIN, b"x" * 40_000_000, headers={"content-length": str(length)})


def strange_events(target: Target) -> tuple[str, list[str]]:
    """Values and numbers of events that no page sends; none ends the server, or is told how it failed."""
    number = target.event()
    bodies: list[bytes] = [b"[" * 400_000, b'{"data":' + b"[" * 900 + b"]" * 900 + b',"fn_index":0,"session_hash":"s"}']
    values: list[Any] = [
        [], {}, 3, "x", None, [_EVENT], {"data": []}, {"data": [""] * 9_999}, _EVENT | {"fn_index": -1},
        _EVENT | {"fn_index": 10**9}, _EVENT | {"fn_index": "x"}, _EVENT | {"fn_index": 10**400}, _EVENT | {"session_hash": None},
        _EVENT | {"fn_index": number, "trigger_id": 10**9}, _EVENT | {"batched": True}, _EVENT | {"simple_format": True},
    ]  # fmt: skip
    bodies += [json.dumps(value).encode() for value in values] + [b'{"data":[NaN,1e999],"fn_index":0,"session_hash":"s"}', b"\xff"]
    replies = [
        target.ask(request("POST", path, body, headers={"content-type": "application/json"}), f"127.0.1.{n + 1}")
        for n, body in enumerate(bodies) for path in (JOIN, PREDICT)
    ]  # fmt: skip
    counts = sorted({reply.status for reply in replies})
    problems = [f"a traceback was sent: {reply}" for reply in replies if b"Traceback" in reply.body]
    return f"{len(replies)} bodies: {', '.join(map(str, counts))}", problems + ["hung up"] * any(not s for s in counts)


def named_files(target: Target) -> tuple[str, list[str]]:
    """Events whose values claim to be files here or elsewhere: nothing is read, nothing is fetched."""
    fetched: list[str] = []
    with ExitStack() as stack:
        listening = stack.enter_context(_listener(fetched))
        files = [
            {"path": str(target.secret), "meta": {"_type": "gradio.FileData"}},
            {"path": f"http://127.0.0.1:{listening}/a", "url": f"http://127.0.0.1:{listening}/a", "meta": {"_type": "gradio.FileData"}},
        ]  # fmt: skip
        bodies = [{"data": [file], "fn_index": number, "session_hash": "files"} for file in files for number in range(6)]
        replies = [target.ask(post_json(path, body), "127.0.0.9") for body in bodies for path in (JOIN, PREDICT)]
        with connect(target.port, "127.0.0.9") as stream:
            stream.settimeout(3)
            stream.sendall(request("GET", "/gradio_api/queue/data?session_hash=files"))
            replies.append(read_reply(stream))
    problems = ["a file was served"] * any(SECRET in reply.body for reply in replies) + ["fetched"] * bool(fetched)
    return f"{len(bodies)} events, {len(fetched)} fetched", problems


def _listener(fetched: list[str]) -> Any:
    from contextlib import contextmanager
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fetched.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    @contextmanager
    def listening() -> Any:
        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()

    return listening()


def full_connections(target: Target) -> tuple[str, list[str]]:
    """One address opens more streams than it may; another is still answered."""
    with ExitStack() as stack:
        opened = [stack.enter_context(connect(target.port, "127.0.0.8")) for _ in range(300)]
        for number, connection in enumerate(opened):
            connection.sendall(request("GET", f"/gradio_api/heartbeat/s{number}"))
        statuses = []
        for connection in opened:
            statuses.append(int((connection.recv(12) or b"HTTP/1.1 000").split()[1]))
        other = target.ask(request("GET", "/"), OTHER)
    let_in = statuses.count(200)
    problems = [f"{let_in} streams of one address"] * (let_in > 128) + ["another client is shut out"] * (other.status != 200)
    return f"{let_in} of {len(opened)} let in, another client {other}", problems


def guesses(
    target: Target, source: str = "127.0.0.5", headers: Callable[[int], dict[str, str]] = lambda _: {}
) -> tuple[str, list[str]]:
    """100 wrong passwords of one address, at once."""
    replies: list[Reply] = []

    def guess(number: int) -> None:
        replies.append(target.ask(login(*PASSWORD[:1], f"guess {number}", **headers(number)), source))

    threads = [threading.Thread(target=guess, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tried = sum(reply.status == 400 for reply in replies)
    then = target.ask(login(*PASSWORD), "127.0.0.6")
    problems = [f"{tried} passwords were tried"] * (tried > 8) + [f"the right one elsewhere: {then}"] * (then.status != 200)
    return f"{tried} of {len(replies)} tried, the right one from elsewhere {then}", problems


def login(user: str, password: str, **headers: str) -> bytes:
    """A request to log in, as the page sends it."""
    body, form = multipart({"username": user, "password": password})
    return request("POST", LOGIN, body, headers=form | headers)


def without_login(target: Target) -> tuple[str, list[str]]:
    """Everything that shows or changes something, without a password or with a made-up cookie."""
    cookie = {"cookie": "access-token-x=a; access-token-unsecure-x=a"}
    sent = [post_json(JOIN, _EVENT, headers=cookie), post_json(PREDICT, _EVENT, headers=cookie)]
    sent.append(request("GET", "/gradio_api/queue/data?session_hash=s", headers=cookie))
    replies = [target.ask(one) for one in sent]
    page = target.ask(request("GET", "/", headers=cookie)).body.decode(errors="replace")
    problems = [f"answered {reply}" for reply in replies if reply.status != 401]
    problems += ["the page shows what it is about"] * (not re.search('"components": ?\\[\\]', page))
    return ", ".join(map(str, replies)), problems


OTHERS: dict[str, Callable[[Target], tuple[str, list[str]]]] = {
    "a body too large": too_large,
    "a body without an end": endless,
    "strange events": strange_events,
    "events that name files": named_files,
    "300 connections": full_connections,
}
PASSWORDS: dict[str, Callable[[Target], tuple[str, list[str]]]] = {
    "without logging in": without_login,
    "100 guesses": guesses,
    "100 guesses, other addresses claimed": lambda target: guesses(
        target, "127.0.0.15", lambda number: {"x-forwarded-for": f"10.0.0.{number}"}
    ),
    "log in from another site": refused(login("x", "y", origin="http://evil.example"), status=403),
    "log out from another site": refused(request("GET", "/logout"), request("GET", "/logout?all_session=true")),
    "a name of others, on all addresses": refused(request("GET", "/", host="evil.example"), status=421),
    "write the code, with a password": _post("/gradio_api/vibe-code", {"code": "import os"}),
    "profile, with a password": _get("/gradio_api/profiling/traces"),
}
RAW = [
    *(Attack(name, "label", try_it) for name, try_it in (ROUTES | NAMES | SITES | OTHERS).items()),
    *(Attack(name, "app", try_it) for name, try_it in PASSWORDS.items()),
]
