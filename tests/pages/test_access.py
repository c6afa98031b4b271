"""Who reaches a page: names, passwords, guesses, and which requests are open."""

from __future__ import annotations

import socket

import pytest

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.pages.access import AUTH, credentials
from qlora_dpo.pages.hosts import Hosts, name_of
from qlora_dpo.pages.logins import FORGOTTEN, MOST_CLIENTS, Logins
from qlora_dpo.pages.routes import is_open
from qlora_dpo.pages.serving import Served, serving


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_addresses_need_a_password(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(AUTH, raising=False)
    with pytest.raises(UsageError, match=f"--auth.*{AUTH}"):
        credentials(host, False)
    for value in ("", "ann", "ann:", ":secret-secret", "ann:short"):
        monkeypatch.setenv(AUTH, value)
        with pytest.raises(UsageError, match=AUTH) as error:
            credentials(host, True)
        assert value in {"", "ann"} or value not in str(error.value)
    monkeypatch.setenv(AUTH, "ann:a:long:one")
    assert credentials(host, True) == ("ann", "a:long:one")


def test_this_machine_needs_none_unless_it_is_reached_by_a_name() -> None:
    assert [credentials(host, False) for host in ("127.0.0.1", "::1", "localhost")] == [None] * 3
    with pytest.raises(UsageError, match=r"--allowed_hosts page\.example\.org.*--auth"):
        credentials("127.0.0.1", False, ["page.example.org"])


def test_a_local_page_answers_to_local_names_only() -> None:
    hosts = Hosts.of("127.0.0.1")
    for name in ("localhost", "127.0.0.1", "[::1]"):
        assert hosts.allow(name) and hosts.allow(f"{name}:7860") and hosts.allow(name.upper())
    for name in (
        "",
        ":80",
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.nip.io",
        "0.0.0.0",
        "192.168.1.2",
        "localhost.",
        "localhost:x",
        "localhost@evil",
        "localhost/",
        "127.0.0.2",
        "[::2]",
        "[::ffff:127.0.0.1]",
        socket.gethostname(),
        "lоcalhost",
    ):
        assert not hosts.allow(name), name


def test_a_public_page_answers_to_addresses_the_machine_and_what_is_named() -> None:
    hosts = Hosts.of("0.0.0.0", ["Page.Example.org"])
    for name in ("192.168.1.2:7860", "[2001:db8::1]", socket.gethostname(), "localhost", "page.example.org:443"):
        assert hosts.allow(name), name
    assert not hosts.allow("evil.example") and not hosts.allow("page.example.org.evil.example")
    assert "any numeric address" in str(hosts) and "page.example.org" in str(hosts)
    assert name_of("[2001:DB8::1]:80") == "2001:db8::1"


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/", ""),
        ("GET", "/", "__theme=dark"),
        ("GET", "/assets/index-B_x.js", ""),
        ("GET", "/theme.css", "v=1"),
        ("GET", "/static/fonts/IBMPlexMono/IBMPlexMono-Regular.woff2", ""),
        ("POST", "/gradio_api/queue/join", ""),
        ("GET", "/gradio_api/queue/data", "session_hash=s"),
        ("GET", "/gradio_api/heartbeat/abc123", ""),
        ("POST", "/gradio_api/run/predict", ""),
    ],
)
def test_requests_that_the_pages_make_are_open(method: str, path: str, query: str) -> None:
    assert is_open(method, path, query)


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("GET", "/gradio_api/file=/etc/passwd", ""),
        ("POST", "/gradio_api/upload", ""),
        ("GET", "/login", ""),
        ("POST", "/login", ""),
        ("GET", "/", "deep_link=x"),
        ("GET", "/", "deep_link"),
        ("GET", "/", "__theme=a&page=b"),
        ("POST", "/", ""),
        ("GET", "/gradio_api/queue/join", ""),
        ("GET", "/assets/../x", ""),
        ("GET", "/assets/.env", ""),
        ("GET", "/assets/a//b", ""),
        ("GET", "/assets/a\n", ""),
        ("GET", "/assets/", ""),
        ("GET", "//", ""),
        ("GET", "/config", ""),
        ("GET", "/gradio_api/heartbeat/a/b", ""),
        ("POST", "/gradio_api/vibe-code", ""),
        ("GET", "/gradio_api/queue/data", "session_hash=s&x=1"),
        ("GET", "/static/ａ", ""),
    ],
)
def test_all_others_are_closed(method: str, path: str, query: str) -> None:
    assert not is_open(method, path, query)


def test_logging_in_is_open_where_a_password_is_asked_for() -> None:
    assert is_open("POST", "/login", asks_password=True)
    assert not is_open("GET", "/logout", asks_password=True)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_guessing_gets_slower_and_the_right_password_works_afterwards() -> None:
    clock = Clock()
    logins = Logins(clock)
    assert [logins.wait("10.0.0.1") for _ in range(5)] == [0] * 5
    delays = []
    for _ in range(12):
        delays.append(logins.wait("10.0.0.1"))
        assert logins.wait("10.0.0.1") == delays[-1]  # asking again makes it no longer
        clock.now += delays[-1]
        assert logins.wait("10.0.0.1") == 0
    assert delays == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert logins.wait("10.0.0.2") == 0  # another client
    clock.now += 300
    assert logins.wait("10.0.0.1") == 0
    logins.succeeded("10.0.0.1")
    assert [logins.wait("10.0.0.1") for _ in range(5)] == [0] * 5


def test_guessing_from_many_addresses_gets_slower_but_not_for_who_has_logged_in() -> None:
    clock = Clock()
    logins = Logins(clock)
    assert logins.wait("192.168.0.9") == 0
    logins.succeeded("192.168.0.9")
    waits = [logins.wait(f"10.0.{number // 250}.{number % 250}") for number in range(300)]
    assert waits.count(0) == 50
    assert logins.wait("10.9.9.9") > 0 and logins.wait("192.168.0.9") == 0
    clock.now += 60
    assert logins.wait("10.9.9.9") == 0
    clock.now += FORGOTTEN
    assert [logins.wait(f"10.3.0.{number}") for number in range(50)] == [0] * 50


def test_a_network_of_ipv6_is_one_client_and_few_are_remembered() -> None:
    logins = Logins(Clock())
    assert [logins.wait(f"2001:db8::{number:x}") for number in range(6)] == [0] * 5 + [1]
    for number in range(3 * MOST_CLIENTS):
        logins.wait(f"10.{number // 65536}.{number // 256 % 256}.{number % 256}")
    assert len(logins._clients) == MOST_CLIENTS


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StorageError, match="Name another with --port"):
        with serving(lambda: None, Served(port=taken.getsockname()[1])):
            pass
    with pytest.raises(UsageError, match="--port 70000"):
        Served(port=70000)
