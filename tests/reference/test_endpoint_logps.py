"""Log-probs from servers: whatever way a server is asked in, they are of the very tokens that were sent, or refused."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from openai_server import SPOILED, OpenAIServer, made_up

from qlora_dpo.data.preferences import Message, RefusedRow
from qlora_dpo.endpoint import Endpoint
from qlora_dpo.errors import EndpointError
from qlora_dpo.reference.endpoint_logps import EndpointLogps
from qlora_dpo.reference.served_tokens import LogpsRequest

CHAT_ONLY: dict[str, Any] = {"routes": ("/chat/completions",)}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same retries, without waiting for them."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("qlora_dpo.endpoint._LONGEST_PAUSE", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def words(ids: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def ids_of(messages: list[dict[str, str]]) -> list[int]:
    """A chat template: the words of all messages, then what ends a turn."""
    return [int(word[1:]) for message in messages for word in message["content"].split()] + [2, 3]


def made_requests(count: int, length: int = 9, seed: int = 0) -> list[LogpsRequest]:
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt, answer = ([draw.randrange(3, 500) for _ in range(draw.randrange(1, length))] for _ in range(2))
        messages: list[Message] = [
            {"role": "user", "content": words(prompt)},
            {"role": "assistant", "content": words(answer)},
        ]
        made.append(LogpsRequest(prompt, [*answer, 2], f"pairs.jsonl:{number + 1}", "chosen", messages))
    return made


def expected(request: LogpsRequest) -> NDArray[np.float32]:
    return np.array(made_up(request.ids)[len(request.prompt_ids) :], np.float32)


def client(*servers: OpenAIServer, **options: Any) -> EndpointLogps:
    settings = {"concurrency": 4, "timeout": 0.5, "retries": 4} | options
    return EndpointLogps(Endpoint([server.url for server in servers], "m", **settings), "w{}".format)


def ask(logps: EndpointLogps, requests: Iterable[LogpsRequest]) -> list[tuple[LogpsRequest, Any]]:
    return sorted(logps(requests), key=lambda item: int(item[0].origin.split(":")[1]))


def check(found: list[tuple[LogpsRequest, Any]], requests: Sequence[LogpsRequest]) -> None:
    """Every request has exactly its own log-probs."""
    assert [request for request, _ in found] == list(requests)
    for request, values in found:
        assert not isinstance(values, RefusedRow), values
        assert values.dtype == np.float32 and np.array_equal(values, expected(request))


@pytest.mark.parametrize(
    ("form", "way", "more"),
    [
        ({}, "prompt_logprobs of token ids", 0),
        ({"knows": ("echo", "token_ids")}, "echo with logprobs of token ids", 1),
        ({"knows": ("echo",)}, "echo with logprobs of token ids", 1),
        ({"knows": ("echo", "token_ids"), "refuses_unknown": True}, "echo with logprobs of token ids", 1),
        (CHAT_ONLY, "prompt_logprobs of messages", 2),
    ],
)
def test_every_way_gives_the_log_probs_of_the_completion(
    form: dict[str, Any], way: str, more: int, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = made_requests(12)
    with OpenAIServer(render=ids_of, **form) as server:
        check(ask(client(server), requests), requests)
        assert len(server.requests) == 12 + more  # the way is found once, with a request that had to be made
    assert capsys.readouterr().err == f"{server.url} is asked for {way}.\n"


def test_two_servers_are_asked_each_in_its_own_way() -> None:
    requests = made_requests(30)
    with OpenAIServer(delay=0.01) as one, OpenAIServer(knows=("echo",), delay=0.01) as other:
        check(ask(client(one, other), requests), requests)
        assert min(len(one.requests), len(other.requests)) >= 8
        assert all("echo" not in request for request in one.requests)


@pytest.mark.parametrize("form", [{"knows": ()}, {"knows": (), "refuses_unknown": True, **CHAT_ONLY}])
def test_a_server_without_log_probs_is_named(form: dict[str, Any]) -> None:
    with OpenAIServer(**form) as server, pytest.raises(EndpointError, match="gives no log-probs") as error:
        ask(client(server, concurrency=1), made_requests(3))
    assert server.url in str(error.value) and "prompt_logprobs of token ids" in str(error.value)
    assert len(server.requests) == 3


@pytest.mark.parametrize("form", [{}, {"knows": ("echo", "token_ids")}])
@pytest.mark.parametrize(
    ("fault", "named"),
    [("fewer_tokens", r"scored \d+ tokens of \d+"), ("more_tokens", r"scored \d+ tokens of \d+"),
     ("other_ids", r"token (\d+) of \1 \(token \d+ of the answer\) is 'w2' \(id 2\), but the server has .*\(id 3\)"),
     ("null", r"token (\d+) of \1 .* has None for its log-prob"), ("nan", "has nan"), ("positive", "has 0.5"),
     ("minus_infinity", "has -9999.0"), ("zeros", "0.0 for every token")],
)  # fmt: skip
def test_other_tokens_and_missing_values_stop_the_run_and_name_the_row(
    form: dict[str, Any], fault: str, named: str
) -> None:
    requests = made_requests(9)
    bad = requests[6]

    def at_bad(request: dict[str, Any]) -> str | None:
        return fault if request["prompt"] == bad.ids else None

    with OpenAIServer(fault=at_bad, **form) as server:
        found = []
        with pytest.raises(EndpointError, match=named) as error:
            for item in client(server, concurrency=2)(requests):
                found.append(item)
    assert str(error.value).startswith("pairs.jsonl:7: chosen: ") and server.url in str(error.value)
    origins = {request.origin for request, _ in found}
    check(found, [request for request, _ in found])
    assert bad.origin not in origins and origins >= {request.origin for request in requests[:5]}  # none is lost


def test_every_spoiled_answer_is_tested() -> None:
    (mark, *_) = [
        mark
        for mark in test_other_tokens_and_missing_values_stop_the_run_and_name_the_row.pytestmark  # type: ignore[attr-defined]
        if mark.args[0] == ("fault", "named")
    ]
    assert {name for name, _ in mark.args[1]} == set(SPOILED)


def test_other_texts_are_noticed_where_a_server_tells_no_ids() -> None:
    texts = {7: " w7", 8: "\ufffd", 9: "<0x0A>", 10: "", 11: "other"}
    with OpenAIServer(knows=("echo",), text_of=lambda token: texts.get(token, f"▁w{token}")) as server:
        harmless, bad = (
            LogpsRequest([5, 7], [8, 9, 10, 6], "f:1", "chosen"),
            LogpsRequest([5, 7], [11], "f:2", "rejected"),
        )
        ((_, values),) = client(server)([harmless])
        assert np.array_equal(values, expected(harmless))
        with pytest.raises(EndpointError, match=r"f:2: rejected: token 3 of 3 .* 'w11' .* the server has 'other'"):
            list(client(server)([bad]))


@pytest.mark.parametrize("fault", ["429", "500", "503", "timeout", "disconnect", "html", "broken_json", "no_choices"])
def test_a_fault_is_survived(fault: str) -> None:
    requests = made_requests(6)
    with OpenAIServer(faults=[fault, None, fault, None, None, fault]) as server:
        check(ask(client(server, concurrency=2), requests), requests)


def test_an_answer_that_leaves_them_out_is_asked_for_again() -> None:
    requests = made_requests(6)
    with OpenAIServer() as server:
        logps = client(server, concurrency=1)
        check(ask(logps, requests[:1]), requests[:1])
        server.knows = ()

        def again(request: dict[str, Any]) -> None:
            server.knows = ("prompt_logprobs",) if len(server.requests) >= 3 else ()

        server.fault = again
        check(ask(logps, requests), requests)
        assert len(server.requests) == 1 + 6 + 1


def test_a_server_that_dies_half_way_is_left_out() -> None:
    requests = made_requests(60)
    with OpenAIServer(delay=0.005) as healthy, OpenAIServer(delay=0.005) as dying:
        dying.fault = lambda request: dying.die() if len(dying.requests) == 10 else None
        check(ask(client(dying, healthy), requests), requests)
        assert len(healthy.requests) >= 45


def test_what_a_server_answered_before_it_died_is_not_lost() -> None:
    requests = made_requests(40)
    with OpenAIServer() as server:
        server.fault = lambda request: server.die() if len(server.requests) == 21 else None
        found = []
        with pytest.raises(EndpointError, match=r"no answer.*\n.*no connection.*\nAll answers so far are kept"):
            for item in client(server, concurrency=2)(requests):
                found.append(item)
    check(found, [request for request, _ in found])
    assert len(found) >= 19


def test_a_row_that_the_server_does_not_take_is_named_and_the_others_go_on() -> None:
    requests = made_requests(8)

    def too_long(request: dict[str, Any]) -> str | None:
        return "400" if request.get("prompt") == requests[3].ids else None

    with OpenAIServer(fault=too_long) as server:
        found = ask(client(server), requests)
    refused = [values for _, values in found if isinstance(values, RefusedRow)]
    assert [(row.origin, row.field) for row in refused] == [("pairs.jsonl:4", "chosen")]
    assert "maximum context length" in refused[0].reason
    check([item for item in found if item[1] is not refused[0]], requests[:3] + requests[4:])


def test_a_row_that_a_chat_template_renders_otherwise_is_named_and_the_others_go_on() -> None:
    requests = made_requests(8)

    def render(messages: list[dict[str, str]]) -> list[int]:
        ids = ids_of(messages)
        return ids[:1] + ids[2:] if messages[0]["content"] == words(requests[3].prompt_ids) else ids

    with OpenAIServer(render=render, **CHAT_ONLY) as server:
        found = ask(client(server), requests)
    refused = [values for _, values in found if isinstance(values, RefusedRow)]
    assert [row.origin for row in refused] == ["pairs.jsonl:4"] and "token 2 of" in refused[0].reason
    check([item for item in found if item[1] is not refused[0]], requests[:3] + requests[4:])


def test_the_server_always_has_requests_to_work_on() -> None:
    draw = random.Random(1)
    with OpenAIServer(delay=lambda: draw.uniform(0.3, 0.6)) as server:
        ask(client(server, concurrency=16, timeout=5), made_requests(96))
        assert server.most_in_flight == 16
        assert server.mean_in_flight() > 11


FILL = """
import sys
from openai_server import OpenAIServer
from qlora_dpo.endpoint import Endpoint
from qlora_dpo.reference.endpoint_logps import EndpointLogps
from qlora_dpo.reference.served_tokens import LogpsRequest

def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

before = peak()
url = sys.argv[1]
requests = (LogpsRequest(range(3, 1003), [*range(5, 1004), 2], f"f:{n}", "chosen") for n in range(48))
count = sum(len(values) == 1000 for _, values in EndpointLogps(Endpoint([url], "m"), str)(requests))
assert count == 48
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(peak() - before, peak())
"""


@pytest.mark.slow
def test_sixteen_requests_of_2000_tokens_need_little_memory() -> None:
    tests = Path(__file__).resolve().parents[1]
    with OpenAIServer(delay=0.8) as server:
        result = subprocess.run(
            [sys.executable, "-c", FILL, server.url], cwd=tests, capture_output=True, text=True, check=True,
            env={"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert server.most_in_flight == 16
    own, whole = map(float, result.stdout.split())
    assert own < 100 and whole < 150  # MiB
