"""The requests that a browser with one of the pages open makes; everything else that Gradio serves is closed.

Gradio 6.31 has about 70 routes. These were recorded from a browser that goes through each page; `tests/pages` does it
again and fails where a request was refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

_NAME = r"[\w@-][\w.@-]*"  # of a file or folder: no hidden one, no way up
_SESSION = r"[\w-]{1,64}"


@dataclass(frozen=True)
class Route:
    """One kind of request: its method, its whole path, and the names that its query may have."""

    method: str
    path: str
    query: frozenset[str] = frozenset()

    def fits(self, method: str, path: str, query: str) -> bool:
        """Whether a request is of this kind."""
        if method != self.method or not re.fullmatch(self.path, path, re.ASCII):
            return False
        return not query or {name for name, _ in parse_qsl(query, keep_blank_values=True)} <= self.query


ROUTES = (
    Route("GET", "/", frozenset({"__theme"})),
    Route("GET", rf"/(assets|static)(/{_NAME})+"),
    Route("GET", "/theme.css", frozenset({"v"})),
    Route("GET", "/favicon.ico"),
    Route("POST", "/gradio_api/queue/join", frozenset({"__theme"})),
    Route("GET", "/gradio_api/queue/data", frozenset({"session_hash"})),
    Route("POST", "/gradio_api/run/predict", frozenset({"__theme"})),
    Route("POST", "/gradio_api/cancel"),
    Route("GET", f"/gradio_api/heartbeat/{_SESSION}"),
)
LOGIN = Route("POST", "/login")


def is_open(method: str, path: str, query: str = "", *, asks_password: bool = False) -> bool:
    """Whether a request is one that a page makes; logging in is, where a password is asked for."""
    routes = (*ROUTES, LOGIN) if asks_password else ROUTES
    return any(route.fits(method, path, query) for route in routes)
