"""The guard before a page of Gradio: what passes, what a flood comes to, and what environment variables do not open."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from visitors import browser, config_of

from benchmarks.chaos import raw_http
from benchmarks.chaos.attack import PASSWORD, Attack, Target, login
from benchmarks.chaos.attacks import RAW
from benchmarks.chaos.attacks_browser import by_browser
from benchmarks.chaos.pages import VARIABLES
from benchmarks.chaos.raw_http import exchange, post_json, request
from qlora_dpo.labeling.annotation import Annotation
from qlora_dpo.labeling.human import build_page
from qlora_dpo.labeling.records import Candidates, Record
from qlora_dpo.pages import guard, serving
from qlora_dpo.pages.guard import Guard, Message
from qlora_dpo.pages.hosts import Hosts
from qlora_dpo.pages.serving import Served
from qlora_dpo.pages.waiting import MAX_WAITING, OF_ONE_ADDRESS

# What Gradio, FastAPI or the server would refuse by themselves; all others get through where there is no guard.
HELD_ANYWAY = {
    "read a file, no prefix",
    "read a file, two slashes",
    "read a hidden file",
    "stream",
    "code of a component",
    "history of runs",
    "connect a history",
    "profile",
    "clear the profile",
    "tools for agents",
    "direct call, old form",
    "websocket",
    "two names",
    "a name in the path",
    "strange events",
    "events that name files",
    "without logging in",
    "profile, with a password",
    "read the code",
    "write the code",
    "have the code rewritten",
    "take code back",
    "ask for ideas",
    "write the code, with a password",
}
SLOW = {"300 connections", "a body without an end", "100 guesses", "100 guesses, other addresses claimed"}
QUICK = [attack for attack in RAW if attack.name not in SLOW]


@contextmanager
def pages(folder: Path) -> Iterator[dict[str, Target]]:
    """The labelling page without and with a password, where the environment wants more to be served."""
    secret = folder / "secret.txt"
    secret.write_bytes(b"the content of a file")
    scratch = folder / "scratch"
    scratch.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (VARIABLES | {"GRADIO_TEMP_DIR": str(scratch)}).items():
            patch.setenv(name, value)
        patch.setattr(tempfile, "tempdir", str(scratch))
        items = [Candidates(f"p{n}", ("a", "b")) for n in range(50)]
        annotation = Annotation(items, Record(folder / "pairs.labels.jsonl"), "ann")

        def build() -> Any:
            return build_page(annotation)

        with (
            serving.serving(build, Served()) as label,
            serving.serving(build, Served("0.0.0.0", auth=PASSWORD)) as app,
        ):
            yield {
                name: Target(int(address.rpartition(":")[2]), secret, scratch)
                for name, address in (("label", label), ("app", app))
            }


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with pages(tmp_path_factory.mktemp("guarded")) as found:
        yield found


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: attack.name)
def test_attack_comes_to_nothing(attack: Attack, targets: dict[str, Target]) -> None:
    assert attack(targets[attack.page])[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
def test_flood_comes_to_nothing(name: str, targets: dict[str, Target]) -> None:
    attack = next(one for one in RAW if one.name == name)
    assert attack(targets[attack.page])[1] == []


@pytest.mark.slow
def test_without_the_guard_attacks_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "Guard", lambda app, hosts, logins: app)
    monkeypatch.setattr(raw_http, "SECONDS", 2.0)  # some are answered without an end
    with pages(tmp_path) as targets:
        held = {attack.name for attack in QUICK if not attack(targets[attack.page])[1]}
        assert held <= HELD_ANYWAY
        with browser():
            pass
        assert not [name for name, _, problems in by_browser(targets["label"]) if not problems]


@pytest.mark.slow
def test_other_sites_in_a_browser_come_to_nothing(targets: dict[str, Target]) -> None:
    with browser():
        pass  # skips where there is none
    found = {name: problems for name, _, problems in by_browser(targets["label"])}
    assert len(found) > 15 and not any(found.values()), found


def test_what_the_page_sends_passes(targets: dict[str, Target]) -> None:
    target = targets["label"]
    own = {"origin": f"http://localhost:{target.port}", "sec-fetch-site": "same-origin"}
    event = {"data": [""], "fn_index": target.event("press_u"), "session_hash": "mine"}
    for host in (f"localhost:{target.port}", f"127.0.0.1:{target.port}", "[::1]"):
        headers = own | {"origin": f"http://{host}"}
        assert target.ask(post_json("/gradio_api/queue/join", event, host=host, headers=headers)).status == 200
    opened = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    reply = target.ask(request("GET", "/", headers=opened))  # by a link
    assert reply.status == 200 and reply.headers["content-security-policy"] == guard.POLICY
    assert target.ask(request("GET", "/", host="evil.example")).headers["x-content-type-options"] == "nosniff"


def test_variables_of_gradio_change_nothing(targets: dict[str, Target]) -> None:
    assert not [name for name in os.environ if name.startswith("GRADIO_")]
    config = config_of(f"http://localhost:{targets['label'].port}")
    assert config["root"] == f"http://localhost:{targets['label'].port}"
    assert not any(
        config.get(name) for name in ("dev_mode", "vibe_mode", "mcp_server", "is_space", "enable_monitoring")
    )


def test_the_right_password_opens_the_page(targets: dict[str, Target]) -> None:
    target = targets["app"]
    reply = target.ask(login(*PASSWORD), "127.0.0.33")
    assert reply.status == 200
    cookie = {"cookie": reply.headers["set-cookie"].partition(";")[0]}
    assert b"press_1" in target.ask(request("GET", "/", headers=cookie)).body
    assert b"press_1" not in target.ask(request("GET", "/")).body


def test_one_address_does_not_fill_the_queue() -> None:
    import gradio as gr

    go_on = threading.Event()

    def build() -> Any:
        with gr.Blocks() as blocks:
            gr.Button().click(lambda: go_on.wait(60), None, None, api_name="slow")
        return blocks

    with serving.serving(build, Served()) as address:
        port = int(address.rpartition(":")[2])
        try:

            def join(number: int, source: str) -> int:
                body = {"data": [], "fn_index": 0, "session_hash": f"s{number}"}
                return exchange(port, post_json("/gradio_api/queue/join", body), source).status

            assert join(0, "127.0.0.1") == 200
            time.sleep(0.5)  # it is its turn
            statuses = [join(number, "127.0.0.2") for number in range(MAX_WAITING)]
            assert statuses == [200] * OF_ONE_ADDRESS + [503] * (MAX_WAITING - OF_ONE_ADDRESS)
            assert join(100, "127.0.0.3") == 200
        finally:
            go_on.set()


def test_a_dripping_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

    async def drip() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert answer(receive=drip) == 408


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        b"[" * 100_000,
        b"\xff",
        b'{"data": [{"path": "http://x/", "meta": {"_type": "gradio.FileData"}}]}',
        b'{"data": [[{"a": [{"\\u006deta": {}}]}]]}',
        b'{"meta": {}, "meta": 1}',
    ],
)
def test_an_event_that_is_none_or_claims_to_hold_a_file_is_refused(body: bytes) -> None:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    assert answer(receive) == 400


def test_a_sender_who_leaves_is_no_request() -> None:
    async def left() -> Message:
        return {"type": "http.disconnect"}

    assert answer(receive=left) == 408


def answer(receive: Any) -> int:
    """The status of a request to an application that always answers 200."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    statuses = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/gradio_api/queue/join",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(Guard(app, Hosts.of("127.0.0.1"), None)(scope, receive, send))
    return int(statuses[0])
