"""Serve a Gradio page behind the guard, by a server of our own: `launch` reads two dozen environment variables, opens
more ports where one of them says so, and takes no application around its own."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.pages.guard import Guard
from qlora_dpo.pages.hosts import LOCAL, Hosts
from qlora_dpo.pages.logins import Logins
from qlora_dpo.pages.waiting import share_queue

START_SECONDS = 120.0


@dataclass(frozen=True)
class Served:
    """Where a page is served, and to whom."""

    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""
    auth: tuple[str, str] | None = None
    """User and password."""
    allowed_hosts: Sequence[str] = ()
    """Names of a proxy before it."""

    def __post_init__(self) -> None:
        """Raise a `UsageError` where there is no such port."""
        if not 0 <= self.port < 65536:
            raise UsageError(f"--port {self.port}: must be between 0 and 65535.")


def no_look() -> dict[str, Any]:
    """Gradio's own theme."""
    return {}


def serve(build: Callable[[], Any], served: Served, title: str, look: Callable[[], dict[str, Any]] = no_look) -> None:
    """Serve a page until Ctrl-C, and say where.

    Raises:
        StorageError: the address or the port cannot be opened.
    """
    with serving(build, served, look) as address:
        names = "" if served.host in LOCAL else f", by the names {Hosts.of(served.host, served.allowed_hosts)}"
        print(f"{title}: {address}{names} (Ctrl-C ends it)", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


@contextmanager
def serving(build: Callable[[], Any], served: Served, look: Callable[[], dict[str, Any]] = no_look) -> Iterator[str]:
    """The address of a page that is served within this block, by a thread. `build` makes the Gradio page, `look` its
    theme and style, as `mount_gradio_app` takes them.

    Raises:
        StorageError: the address or the port cannot be opened.
    """
    with _bound(served.host, served.port) as listening:
        # Made within the server's event loop: without one, each lock of Gradio's makes a loop that nobody closes.
        make = partial(_app, build, served, look)
        # It is quiet: events of others that fail say so to who sent them, and those of a page in Gradio's own words.
        is_proxied = bool(served.allowed_hosts)
        server = uvicorn.Server(
            uvicorn.Config(
                make,
                factory=True,
                http="h11",
                ws="none",
                log_level="critical",
                server_header=False,
                access_log=False,
                proxy_headers=is_proxied,
                forwarded_allow_ips="127.0.0.1",
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        _wait_for(server, thread)
        try:
            yield f"http://{_shown(served.host)}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def _app(build: Callable[[], Any], served: Served, look: Callable[[], dict[str, Any]]) -> Guard:
    """The guarded application."""
    _forget_variables()
    import gradio as gr

    blocks = build()
    share_queue(blocks)
    for event in blocks.fns.values():
        event.api_visibility = "private"  # Gradio describes all others to whoever comes, before a password is asked for
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        server_name=served.host,
        server_port=served.port,
        auth=served.auth,
        root_path="",
        allowed_paths=[],
        blocked_paths=["/"],
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        pwa=False,
        footer_links=[],
        **look(),
    )
    return Guard(app, Hosts.of(served.host, served.allowed_hosts), Logins() if served.auth else None)


def _forget_variables() -> None:
    """Gradio's environment variables do not reach a page: they share it, serve folders, open its interface."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise StorageError(f"{host}, port {port} cannot be opened: {error}. Name another with --port.") from error


def _wait_for(server: uvicorn.Server, thread: threading.Thread) -> None:
    end = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise StorageError("the page's server did not start; what it said stands above.")
        time.sleep(0.01)


def _shown(host: str) -> str:
    """The address as a browser takes it."""
    if host in {"0.0.0.0", "::"}:
        return "localhost"
    return f"[{host}]" if ":" in host else host
