"""HTTP by hand: requests that no library would send, from any address of this machine."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any

SECONDS = 10.0  # for a whole reply
MOST_BYTES = 5_000_000


@dataclass(frozen=True)
class Reply:
    """What a server answered; status 0 where it hung up without a word."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def __str__(self) -> str:
        return str(self.status) if self.status else "hung up"


def request(
    method: str, path: str, body: bytes = b"", *, host: str = "localhost", headers: dict[str, str] | None = None
) -> bytes:
    """The bytes of a request; a header named `host` replaces the usual one."""
    named = {"host": host, "content-length": str(len(body))} | (headers or {})
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def connect(port: int, source: str = "127.0.0.1") -> socket.socket:
    """A connection from one of this machine's own addresses (127.0.0.0/8)."""
    return socket.create_connection(("127.0.0.1", port), SECONDS, (source, 0))


def exchange(port: int, sent: bytes, source: str = "127.0.0.1") -> Reply:
    """Send bytes, and read what comes back."""
    with connect(port, source) as connection:
        try:
            connection.sendall(sent)
        except OSError:  # it hung up meanwhile; what it said can still be read
            pass
        return read_reply(connection)


def read_reply(connection: socket.socket) -> Reply:
    """A reply, as far as it comes within the time."""
    received, end = bytearray(), time.monotonic() + SECONDS
    try:
        while len(received) < MOST_BYTES and time.monotonic() < end and (piece := connection.recv(65536)):
            received += piece
    except OSError:
        pass
    return parsed(bytes(received))


def parsed(received: bytes) -> Reply:
    """The reply that these bytes are."""
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split()
    if len(parts) < 2 or not parts[1].isdigit():
        return Reply(0)
    pairs = (line.partition(":") for line in lines)
    return Reply(int(parts[1]), {name.lower(): value.strip() for name, _, value in pairs}, body)


def post_json(path: str, value: Any, **more: Any) -> bytes:
    """A request as the page's own script sends it."""
    headers = {"content-type": "application/json"} | more.pop("headers", {})
    return request("POST", path, json.dumps(value).encode(), headers=headers, **more)


def multipart(fields: dict[str, str], file: str = "", size: int = 0) -> tuple[bytes, dict[str, str]]:
    """(body, headers) of a form, with a file of so many bytes where one is named."""
    edge = "----edge"
    head = f"--{edge}\r\ncontent-disposition: form-data; name="
    body = "".join(f'{head}"{name}"\r\n\r\n{text}\r\n' for name, text in fields.items()).encode()
    if file:
        body += f'{head}"files"; filename="{file}"\r\n\r\n'.encode() + b"x" * size + b"\r\n"
    return body + f"--{edge}--\r\n".encode(), {"content-type": f"multipart/form-data; boundary={edge}"}
