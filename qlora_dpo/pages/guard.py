"""What stands before Gradio: who may ask, for what, how much at once, and what a browser may load."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from qlora_dpo.pages.hosts import Hosts, name_of
from qlora_dpo.pages.logins import Logins
from qlora_dpo.pages.routes import LOGIN, is_open

MAX_REQUEST_BYTES = 1_000_000
MAX_READ_PAST = 32 * MAX_REQUEST_BYTES  # of a request that is too large, until its sender is cut off
BODY_SECONDS = 30.0  # from the first to the last byte of a body
OPEN_REQUESTS = 128  # of one address; a browser keeps six

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; img-src 'self' data: blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
REFUSALS = {
    400: "Not an event of this page.",
    403: "A request of another site.",
    404: "Not here.",
    408: "The request took too long.",
    413: "The request is too large.",
    421: "This page does not answer to that name; --allowed_hosts names others.",
    429: "Too many requests; try again later.",
}


class Refusal(Exception):
    """A request that is not let through."""

    def __init__(self, status: int, after: float = 0.0) -> None:
        super().__init__(status)
        self.status, self.after = status, after


class Guard:
    """An ASGI application around Gradio's."""

    def __init__(self, app: App, hosts: Hosts, logins: Logins | None) -> None:
        """`logins` where a password is asked for."""
        self._app, self._hosts, self._logins = app, hosts, logins
        self._open = Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                self._check(scope)
                with self._opened(address_of(scope)):
                    await self._let_through(scope, receive, _with_headers(send))
            except Refusal as refusal:
                await _refuse(send, refusal)

    def _check(self, scope: Scope) -> None:
        """Raise a `Refusal` where the request is not one that a page of this server makes."""
        headers = Headers(scope)
        authorities = [*headers.all("host"), *headers.split("x-forwarded-host")]
        if len(headers.all("host")) != 1 or not all(map(self._hosts.allow, authorities)):
            raise Refusal(421)
        query = scope["query_string"].decode("latin-1")
        if not is_open(scope["method"], scope["path"], query, asks_password=self._logins is not None):
            raise Refusal(404)
        if not self._is_own(scope, headers, authorities):
            raise Refusal(403)

    def _is_own(self, scope: Scope, headers: Headers, authorities: list[str]) -> bool:
        """Whether a browser says that this page sends the request, or that somebody opens it; others say nothing."""
        for origin in headers.all("origin"):
            authority = origin.partition("://")[2].lower()
            if authority not in authorities and name_of(authority) not in self._hosts.named:
                return False
        if {"same-origin", "none"}.issuperset(headers.all("sec-fetch-site")):
            return True
        is_opened = headers.all("sec-fetch-mode") == ["navigate"] and headers.all("sec-fetch-dest") == ["document"]
        return is_opened and scope["path"] == "/"

    @contextmanager
    def _opened(self, address: str) -> Iterator[None]:
        """Count the open requests of an address."""
        if self._open[address] >= OPEN_REQUESTS:
            raise Refusal(429, after=1)
        self._open[address] += 1
        try:
            yield
        finally:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]

    async def _let_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == LOGIN.path:
            send = self._counted(address_of(scope), send)
        body = await _body(Headers(scope), receive)
        if scope["method"] == "POST" and scope["path"] != LOGIN.path:
            _check_event(body)
        await self._app(scope, _replayed(body, receive), send)

    def _counted(self, address: str, send: Send) -> Send:
        """Raise a `Refusal` where a client has to wait before it tries another password; see what becomes of this one.

        Gradio answers 200 to the right one only.
        """
        assert self._logins is not None
        logins = self._logins
        if seconds := logins.wait(address):
            raise Refusal(429, after=seconds)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                logins.succeeded(address)
            await send(message)

        return sent


class Headers:
    """The headers of a request."""

    def __init__(self, scope: Scope) -> None:
        self._pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]

    def all(self, name: str) -> list[str]:
        """Every value that is given under a name, in small letters."""
        return [value.strip().lower() for found, value in self._pairs if found == name]

    def split(self, name: str) -> list[str]:
        """The same, of lists with commas."""
        return [part.strip() for value in self.all(name) for part in value.split(",")]


def address_of(scope: Scope) -> str:
    """Where a request comes from."""
    return str((scope.get("client") or ("unknown",))[0])


async def _body(headers: Headers, receive: Receive) -> bytes:
    """The whole body of a request.

    Raises:
        Refusal: it is too large, or dripping.
    """
    lengths = [int(value) if value.isdigit() else math.inf for value in headers.all("content-length")]
    if max(lengths, default=0) > MAX_REQUEST_BYTES:
        await _read_past(receive)
        raise Refusal(413)
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(408)
                body += message.get("body", b"")
                if len(body) > MAX_REQUEST_BYTES:
                    raise Refusal(413)
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise Refusal(408) from None


def _check_event(body: bytes) -> None:
    """Raise a `Refusal` where an event is no JSON, is nested without an end, or has values that claim to be files:
    Gradio would fetch them from where they say, and keep them."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        if any(name in {"meta", "_type"} for name, _ in pairs):
            raise Refusal(400)

    try:
        json.loads(body, object_pairs_hook=check)
    except (ValueError, RecursionError):
        raise Refusal(400) from None


async def _read_past(receive: Receive) -> None:
    """Let a client finish sending, within limits: one that is cut off meanwhile never reads the answer."""
    left = MAX_READ_PAST
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What an application receives: the body that has been read, then whatever follows."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return rest.pop() if rest else await receive()

    return received


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message.get("headers", ()), *own]
        await send(message)

    return sent


async def _refuse(send: Send, refusal: Refusal) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    if refusal.after:
        headers.append((b"retry-after", str(math.ceil(refusal.after)).encode()))
    send = _with_headers(send)
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": REFUSALS[refusal.status].encode() + b"\n"})
