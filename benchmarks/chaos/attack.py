"""What an attack on a page is, and what most of them are made of: requests, and the answer that they must get."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.raw_http import Reply, exchange, multipart, post_json, request

JOIN, PREDICT, LOGIN = "/gradio_api/queue/join", "/gradio_api/run/predict", "/login"
SECRET = b"the content of a file"
PASSWORD = ("ann", "long-secret")
EVENT = {"data": [""], "fn_index": 0, "session_hash": "s"}
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


Try = Callable[[Target], tuple[str, list[str]]]


def refused(*sent: bytes, status: int = 404) -> Callable[[Target], tuple[str, list[str]]]:
    """Requests that must be answered with a status, and with nothing of the secret."""

    def try_it(target: Target) -> tuple[str, list[str]]:
        replies = [target.ask(one.replace(b"SECRET", str(target.secret).encode())) for one in sent]
        problems = [f"answered {reply}, not {status}" for reply in replies if reply.status != status]
        problems += ["a file was served"] * any(SECRET in reply.body for reply in replies)
        return ", ".join(map(str, replies)), problems

    return try_it


def get(path: str) -> Callable[[Target], tuple[str, list[str]]]:
    return refused(request("GET", path))


def post(path: str, value: Any = None, **headers: str) -> Callable[[Target], tuple[str, list[str]]]:
    return refused(post_json(path, value or {}, headers=headers))


def login(user: str, password: str, **headers: str) -> bytes:
    """A request to log in, as the page sends it."""
    body, form = multipart({"username": user, "password": password})
    return request("POST", LOGIN, body, headers=form | headers)
