"""What stands before Gradio: no route that serves files, no large requests, and a policy of what a browser may load."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from eval.page.limits import MAX_REQUEST_BYTES

MAX_READ_PAST = 32 * MAX_REQUEST_BYTES  # of a request that is too large, until its sender is cut off

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Routes of Gradio that read files, take files, or fetch from elsewhere. The page uses none of them.
CLOSED = (
    "file", "upload", "proxy", "stream", "custom_component", "component_server", "deep_link", "runs", "run-history",
    "process_recording", "monitoring", "call", "info", "openapi.json", "token", "vibe", "dev",
)  # fmt: skip
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; img-src 'self' data: blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI application around Gradio's."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer 404 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif is_closed(scope["path"]):
            await _refuse(send, 404)
        elif _length(scope) > MAX_REQUEST_BYTES:
            await _read_past(receive)
            await _refuse(send, 413)
        else:
            await self._app(scope, _Limited(receive), _with_headers(send))


class _Limited:
    """The body of a request, which ends where it is longer than it may be."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._left = receive, MAX_REQUEST_BYTES

    async def __call__(self) -> MutableMapping[str, Any]:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        return message if self._left >= 0 else {"type": "http.disconnect"}


def is_closed(path: str) -> bool:
    """Whether a path leads to what the page does not need."""
    parts = [part for part in path.lower().split("/") if part]
    if ".." in path or "\\" in path or "\x00" in path:
        return True
    rest = parts[1:] if parts[:1] == ["gradio_api"] else parts
    return bool(rest) and rest[0].split("=")[0] in CLOSED


def _length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else MAX_REQUEST_BYTES + 1
    return 0


def _with_headers(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            message["headers"] = [*message.get("headers", ()), *own]
        await send(message)

    return sent


async def _read_past(receive: Receive) -> None:
    """Let a client finish sending, within limits: one that is cut off meanwhile never reads the answer."""
    left = MAX_READ_PAST
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if not message.get("more_body", False):
            return


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"not here\n" if status == 404 else b"too large\n"})
