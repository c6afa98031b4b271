"""The client of OpenAI-compatible servers: every fault is survived or named, N requests in flight, nothing lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from openai_server import OpenAIServer

from qlora_dpo.endpoint import Endpoint, Reply, RequestRefused
from qlora_dpo.errors import EndpointError, UsageError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same retries, without waiting for them."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("qlora_dpo.endpoint._LONGEST_PAUSE", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def ask(endpoint: Endpoint, texts: Sequence[str], **options: Any) -> dict[str, str]:
    """The replies to one-message conversations."""

    async def chat(text: str) -> Reply:
        return await endpoint.chat([{"role": "user", "content": text}], max_tokens=5, temperature=0, **options)

    return {text: reply.text for text, reply in endpoint.results(texts, chat)}


def echo(request: dict[str, Any]) -> str:
    return "re: " + str(request["messages"][-1]["content"])


@pytest.mark.parametrize(
    "fault", ["429", "500", "503", "timeout", "disconnect", "html", "broken_json", "no_choices", "error_in_200"]
)
def test_a_fault_is_survived(fault: str) -> None:
    with OpenAIServer(echo, faults=[fault, None, fault]) as server:
        endpoint = Endpoint([server.url], "m", concurrency=2, timeout=0.5, retries=2)
        assert ask(endpoint, ["a", "b", "c"]) == {text: f"re: {text}" for text in "abc"}
        assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("fault", "named"),
    [("500", "internal error"), ("html", "log in to the network"), ("disconnect", "no connection"),
     ("timeout", "no answer within 0.2 seconds")],
)  # fmt: skip
def test_giving_up_names_the_server_and_its_last_answer(fault: str, named: str) -> None:
    with OpenAIServer(fault=lambda request: fault) as server:
        endpoint = Endpoint([server.url], "m", concurrency=2, timeout=0.2, retries=2)
        with pytest.raises(EndpointError) as error:
            ask(endpoint, list("abcdefgh"))
        assert server.url in str(error.value) and named in str(error.value) and "3 times" in str(error.value)
        assert len(server.requests) <= 2 * 3  # nothing is begun after the first gave up


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(EndpointError, match=r"http://127.0.0.1:9/v1: no connection"):
        ask(Endpoint(["http://127.0.0.1:9/v1"], "m", retries=1), ["a"])


@pytest.mark.parametrize(("fault", "advice"), [("401", "OPENAI_API_KEY"), ("404", "--endpoint_model")])
def test_what_no_repetition_heals_is_asked_once_and_hides_the_key(fault: str, advice: str) -> None:
    with OpenAIServer(fault=lambda request: fault) as server:
        with pytest.raises(EndpointError, match=advice) as error:
            ask(Endpoint([server.url], "m", concurrency=1), ["a", "b"])
        assert len(server.requests) == 1
        assert "sk-0" not in str(error.value)


def test_answers_that_are_there_are_yielded_before_the_error() -> None:
    def fault(request: dict[str, Any]) -> str | None:
        return "400" if request["messages"][-1]["content"] == "3" else None

    with OpenAIServer(echo, fault=fault, delay=0.05) as server:
        endpoint = Endpoint([server.url], "m", concurrency=4)
        seen = []

        async def chat(text: str) -> Reply:
            return await endpoint.chat([{"role": "user", "content": text}], max_tokens=5, temperature=0)

        with pytest.raises(RequestRefused, match="context length"):
            for text, _ in endpoint.results(map(str, range(12)), chat):
                seen.append(text)
        assert len(seen) == len(server.requests) - 1 >= 3


def test_n_requests_are_in_flight() -> None:
    with OpenAIServer(echo, delay=0.05) as server:
        assert len(ask(Endpoint([server.url], "m", concurrency=6), [str(number) for number in range(24)])) == 24
        assert server.most_in_flight == 6


def test_several_servers_share_the_requests_and_stand_in_for_each_other() -> None:
    texts = [str(number) for number in range(20)]
    with OpenAIServer(echo, delay=0.02) as one, OpenAIServer(echo, delay=0.02) as other:
        assert len(ask(Endpoint([one.url, other.url], "m", concurrency=4), texts)) == 20
        assert min(len(one.requests), len(other.requests)) >= 5
    with OpenAIServer(echo) as healthy, OpenAIServer(fault=lambda request: "500") as broken:
        endpoint = Endpoint([broken.url, healthy.url], "m", concurrency=2, retries=1)
        assert ask(endpoint, texts) == {text: f"re: {text}" for text in texts}
        assert len(broken.requests) <= 4  # then it rests


def test_results_are_not_written_out_on_the_way() -> None:
    written: list[int] = []

    class Large:
        def __repr__(self) -> str:
            written.append(1)
            return "megabytes"

    async def work(number: int) -> Large:
        return Large()

    with OpenAIServer() as server:
        assert len(list(Endpoint([server.url], "m", concurrency=4).results(range(20), work))) == 20
    assert not written


def test_options_that_a_server_does_not_take_are_left_out_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def fault(request: dict[str, Any]) -> str | None:
        return "400" if "response_format" in request else None

    with OpenAIServer(echo, fault=fault) as server:
        endpoint = Endpoint([server.url], "m", concurrency=1)
        assert ask(endpoint, ["a", "b", "c"], schema={"type": "object"}) == {text: f"re: {text}" for text in "abc"}
        assert len(server.requests) == 4
    assert capsys.readouterr().err.count("does not take response_format") == 1


def test_key_comes_from_the_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenAIServer(echo) as server:
        ask(Endpoint([server.url], "m"), ["a"])
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test-0123456789abcdef")
        ask(Endpoint([server.url], "m"), ["a"])
        without, with_key = (headers["authorization"] for headers in server.headers)
    assert without == "Bearer none" and with_key == "Bearer sk-test-0123456789abcdef"


def test_prompt_logprobs_of_completions() -> None:
    with OpenAIServer() as server:
        endpoint = Endpoint([server.url], "m")

        async def score(ids: list[int]) -> list[Any]:
            body = {"model": "m", "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
            return await endpoint.post("/completions", body, lambda answer: answer["choices"][0]["prompt_logprobs"])

        ((_, logprobs),) = endpoint.results([[1, 5, 9]], score)
        assert logprobs[0] is None and set(logprobs[2]) == {"9"}


@pytest.mark.parametrize(
    ("urls", "model", "named"), [([], "m", "--endpoint_model"), (["localhost:8000"], "m", "whole address")]
)
def test_what_cannot_work_is_refused(urls: list[str], model: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Endpoint(urls, model)


def test_importing_the_client_is_cheap() -> None:
    code = "import sys, qlora_dpo.endpoint; assert not {'openai', 'torch', 'httpx2', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
