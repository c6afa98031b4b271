"""Attacks on the pages by raw HTTP: floods, strange values, guesses; and the list of all."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

from benchmarks.chaos.attack import (
    EVENT,
    JOIN,
    OTHER,
    PASSWORD,
    PREDICT,
    SECRET,
    Attack,
    Target,
    Try,
    get,
    login,
    post,
    refused,
)
from benchmarks.chaos.attacks_requests import NAMES, ROUTES, SITES
from benchmarks.chaos.raw_http import Reply, connect, post_json, read_reply, request


def endless(target: Target) -> tuple[str, list[str]]:
    """A body in pieces that does not end."""
    head = f"POST {JOIN} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    with connect(target.port) as connection:
        connection.sendall(head.encode())
        with suppress(OSError):
            while sent < 2000:
                connection.sendall(piece)
                sent += 1
        reply = read_reply(connection)
    return f"{reply} after {sent * 65536:,} bytes", [] if reply.status in {0, 413} and sent < 1000 else [
        "all of it was taken"
    ]


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
        [],
        {},
        3,
        "x",
        None,
        [EVENT],
        {"data": []},
        {"data": [""] * 9_999},
        EVENT | {"fn_index": -1},
        EVENT | {"fn_index": 10**9},
        EVENT | {"fn_index": "x"},
        EVENT | {"fn_index": 10**400},
        EVENT | {"session_hash": None},
        EVENT | {"fn_index": number, "trigger_id": 10**9},
        EVENT | {"batched": True},
        EVENT | {"simple_format": True},
    ]
    bodies += [json.dumps(value).encode() for value in values] + [
        b'{"data":[NaN,1e999],"fn_index":0,"session_hash":"s"}',
        b"\xff",
    ]
    replies = [
        target.ask(request("POST", path, body, headers={"content-type": "application/json"}), f"127.0.1.{n + 1}")
        for n, body in enumerate(bodies)
        for path in (JOIN, PREDICT)
    ]
    counts = sorted({reply.status for reply in replies})
    problems = [f"a traceback was sent: {reply}" for reply in replies if b"Traceback" in reply.body]
    return f"{len(replies)} bodies: {', '.join(map(str, counts))}", problems + ["hung up"] * any(not s for s in counts)


def named_files(target: Target) -> tuple[str, list[str]]:
    """Events whose values claim to be files here or elsewhere: nothing is read, nothing is fetched."""
    fetched: list[str] = []
    with _listener(fetched) as listening:
        files = [
            {"path": str(target.secret), "meta": {"_type": "gradio.FileData"}},
            {
                "path": f"http://127.0.0.1:{listening}/a",
                "url": f"http://127.0.0.1:{listening}/a",
                "meta": {"_type": "gradio.FileData"},
            },
        ]
        bodies = [
            {"data": [file], "fn_index": number, "session_hash": "files"} for file in files for number in range(6)
        ]
        replies = [target.ask(post_json(path, body), "127.0.0.9") for body in bodies for path in (JOIN, PREDICT)]
        with connect(target.port, "127.0.0.9") as stream:
            stream.settimeout(3)
            stream.sendall(request("GET", "/gradio_api/queue/data?session_hash=files"))
            replies.append(read_reply(stream))
    problems = ["a file was served"] * any(SECRET in reply.body for reply in replies) + ["fetched"] * bool(fetched)
    return f"{len(bodies)} events, {len(fetched)} fetched", problems


class _Fetched(BaseHTTPRequestHandler):
    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _listener(fetched: list[str]) -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (_Fetched,), {"paths": fetched}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


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
    problems = [f"{let_in} streams of one address"] * (let_in > 128) + ["another client is shut out"] * (
        other.status != 200
    )
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
    problems = [f"{tried} passwords were tried"] * (tried > 8) + [f"the right one elsewhere: {then}"] * (
        then.status != 200
    )
    return f"{tried} of {len(replies)} tried, the right one from elsewhere {then}", problems


def without_login(target: Target) -> tuple[str, list[str]]:
    """Everything that shows or changes something, without a password or with a made-up cookie."""
    cookie = {"cookie": "access-token-x=a; access-token-unsecure-x=a"}
    sent = [post_json(JOIN, EVENT, headers=cookie), post_json(PREDICT, EVENT, headers=cookie)]
    sent.append(request("GET", "/gradio_api/queue/data?session_hash=s", headers=cookie))
    replies = [target.ask(one) for one in sent]
    page = target.ask(request("GET", "/", headers=cookie)).body.decode(errors="replace")
    problems = [f"answered {reply}" for reply in replies if reply.status != 401]
    problems += ["the page shows what it is about"] * (not re.search('"components": ?\\[\\]', page))
    return ", ".join(map(str, replies)), problems


OTHERS: dict[str, Try] = {
    "a body too large": too_large,
    "a body without an end": endless,
    "strange events": strange_events,
    "events that name files": named_files,
    "300 connections": full_connections,
}
PASSWORDS: dict[str, Try] = {
    "without logging in": without_login,
    "100 guesses": guesses,
    "100 guesses, other addresses claimed": lambda target: guesses(
        target, "127.0.0.15", lambda number: {"x-forwarded-for": f"10.0.0.{number}"}
    ),
    "log in from another site": refused(login("x", "y", origin="http://evil.example"), status=403),
    "log out from another site": refused(request("GET", "/logout"), request("GET", "/logout?all_session=true")),
    "a name of others, on all addresses": refused(request("GET", "/", host="evil.example"), status=421),
    "write the code, with a password": post("/gradio_api/vibe-code", {"code": "import os"}),
    "profile, with a password": get("/gradio_api/profiling/traces"),
}
RAW = [
    *(Attack(name, "label", try_it) for name, try_it in (ROUTES | NAMES | SITES | OTHERS).items()),
    *(Attack(name, "app", try_it) for name, try_it in PASSWORDS.items()),
]
