"""A model behind OpenAI-compatible servers: many requests in flight, each sent again after a fault, results as they
come.

After 429, 5xx, a timeout or a lost connection the library sends a request again, with growing pauses or as Retry-After
says. An answer that is not this API's JSON is asked for again here, and a request that one server gives no answer to
goes to the next one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from qlora_dpo.errors import EndpointError, UsageError
from qlora_dpo.redaction import redacted

Item = TypeVar("Item")
Result = TypeVar("Result")

KEY_VARIABLE = "OPENAI_API_KEY"
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}
_REFUSING = {400, 413, 422}  # this request, not every one
_NO_ROUTE = {404, 405}
_TEMPORARY = {408, 409, 429}  # and 5xx: the library has already tried again
_REST = 60.0  # seconds in which a server that gave up on a request gets none while others answer
_LONGEST_PAUSE = 8.0  # seconds

# What some servers do not take; it is left out, or called by its other name, once a request passes without it.
_OPTIONAL = {"max_tokens": "max_completion_tokens", "response_format": None, "seed": None, "temperature": None}


class RequestRefused(Exception):
    """The servers take requests, but not this one: it is too long, or its content is not accepted."""


class NoSuchRoute(EndpointError):
    """The server knows nothing at this address, or no model of this name."""


class _BrokenAnswer(ValueError):
    """What came back is no answer of this API."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to one request."""

    text: str
    finish_reason: str
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Server:
    """One of the servers of an endpoint."""

    url: str
    client: Any
    in_flight: int = 0
    rests_until: float = 0.0
    has_failed: bool = False
    """It gave up on its latest request: after its rest it is tried with one at a time."""

    @property
    def rank(self) -> tuple[bool, int]:
        """The lowest gets the next request."""
        is_out = time.monotonic() < self.rests_until or (self.has_failed and self.in_flight > 0)
        return is_out, self.in_flight


@dataclass
class Endpoint:
    """One model on one or more servers.

    Raises:
        UsageError: an address, a number or the model's name cannot be used.
    """

    urls: Sequence[str]
    model: str
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    _servers: list[Server] = field(default_factory=list, init=False)
    _left_out: set[str] = field(default_factory=set, init=False)
    _given_up: EndpointError | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for url in self.urls:
            if urlsplit(url).scheme not in {"http", "https"} or not urlsplit(url).netloc:
                raise UsageError(f"--endpoint {url}: write the whole address, such as http://localhost:8000/v1.")
        if not self.urls or not self.model:
            raise UsageError("--endpoint and --endpoint_model go together: a server, and the name of a model on it.")
        if self.concurrency < 1 or self.timeout <= 0 or self.retries < 0:
            raise UsageError(
                f"--concurrency {self.concurrency}, --timeout {self.timeout} and --retries {self.retries}: the first "
                "two must be above 0, the last at least 0."
            )

    def results(
        self, items: Iterable[Item], work: Callable[[Item], Awaitable[Result]]
    ) -> Iterator[tuple[Item, Result]]:
        """Yield each item with the result of `work(item)` as they are ready, `concurrency` of them at work at a time.

        When one fails no other is begun; those at work are yielded before the error is raised.

        Raises:
            EndpointError: no server gives an answer.
        """
        waiting = iter(items)
        at_work: dict[asyncio.Task[Result], Item] = {}
        failure: BaseException | None = None

        async def next_done() -> set[asyncio.Task[Result]]:
            while failure is None and len(at_work) < self.concurrency:
                for item in waiting:
                    at_work[asyncio.ensure_future(work(item))] = item
                    break
                else:
                    break
            done, _ = await asyncio.wait(at_work, return_when=asyncio.FIRST_COMPLETED) if at_work else (set(), None)
            return done

        with asyncio.Runner() as runner:
            try:
                self._open()
                # Runner.run prepares for Ctrl-C anew each time, and in doing so writes out all results as text.
                while done := runner.get_loop().run_until_complete(next_done()):
                    for task in done:
                        item, error = at_work.pop(task), task.exception()
                        failure = failure or error
                        if error is None:
                            yield item, task.result()
                        elif not isinstance(error, Exception):  # a signal
                            raise error
                if failure is not None:
                    raise failure
            finally:
                runner.run(self._close(at_work))

    async def chat(
        self,
        messages: Sequence[Any],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None = None,
        schema: dict[str, Any] | None = None,
    ) -> Reply:
        """The model's answer to a conversation; within `schema` where the server can hold it to one.

        Raises:
            RequestRefused: the servers do not take this conversation.
            EndpointError: no server gives an answer.
        """
        body: dict[str, Any] = {
            "model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": temperature,
        }  # fmt: skip
        if seed is not None:
            body["seed"] = seed
        if schema is not None:
            named = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        for name in self._left_out:
            body = _without(body, name)
        return await self._chat(body)

    async def post(self, path: str, body: dict[str, Any], read: Callable[[Any], Result]) -> Result:
        """Send one request; `read` makes the result of the answer and raises ValueError where it is none.

        Raises:
            RequestRefused: the servers do not take this request.
            EndpointError: no server gives an answer.
        """
        return await self.ask_one(lambda server: self.send(server, path, body, read))

    async def ask_one(self, ask: Callable[[Server], Awaitable[Result]]) -> Result:
        """Await `ask(server)`, which calls `send`, of one server; where it gives no answer, of the next.

        Raises:
            RequestRefused: the servers do not take this request.
            EndpointError: no server gives an answer.
        """
        failed: dict[str, str] = {}
        broken = 0
        while len(failed) < len(self._servers):
            if self._given_up:
                raise self._given_up
            server = min((server for server in self._servers if server.url not in failed), key=lambda one: one.rank)
            try:
                result = await ask(server)
                server.has_failed = False
                return result
            except _BrokenAnswer as error:
                broken += 1
                if broken <= self.retries:
                    await asyncio.sleep(min(0.5 * 2**broken, _LONGEST_PAUSE) * random.uniform(0.75, 1))
                    continue
                failed[server.url] = str(error)
            except ConnectionError as error:
                failed[server.url] = str(error)
            except EndpointError as error:
                self._given_up = error
                raise
            server.has_failed, server.rests_until = True, time.monotonic() + _REST
        last = "\n".join(f"  {url}: {reason}" for url, reason in failed.items())
        self._given_up = EndpointError(
            f"no answer, asked {self.retries + 1} times:\n{last}\nAll answers so far are kept: see to the server and "
            "run the same command again."
        )
        raise self._given_up

    async def send(self, server: Server, path: str, body: dict[str, Any], read: Callable[[Any], Result]) -> Result:
        """One request to one server, which the library repeats.

        Raises:
            RequestRefused: the server does not take this request.
            NoSuchRoute, EndpointError: the server takes no request of this kind, or none at all.
            _BrokenAnswer: what comes back cannot be read.
            ConnectionError: nothing comes back, or only that the server is busy or broken.
        """
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        server.in_flight += 1
        try:
            return read(await server.client.post(path, body=body, cast_to=object))
        except APITimeoutError as error:
            raise ConnectionError(f"no answer within {self.timeout:g} seconds") from error
        except APIConnectionError as error:
            raise ConnectionError(f"no connection ({error.__cause__ or error})") from error
        except APIStatusError as error:
            if error.status_code in _TEMPORARY or error.status_code >= 500:
                raise ConnectionError(_answer_of(error)) from error
            if error.status_code in _REFUSING:
                raise RequestRefused(_answer_of(error)) from error
            advice = _ADVICE.get(error.status_code, "check --endpoint and --endpoint_model")
            kind = NoSuchRoute if error.status_code in _NO_ROUTE else EndpointError
            raise kind(f"{server.url} answers {_answer_of(error)}; {advice}.") from error
        except ValueError as error:  # no JSON, or not what `read` expects
            raise _BrokenAnswer(f"an answer that is not this API's ({_short(str(error))})") from error
        finally:
            server.in_flight -= 1

    async def _chat(self, body: dict[str, Any]) -> Reply:
        """Send a conversation, and what the server refuses once more without the option that it may not know."""
        try:
            return await self.post("/chat/completions", body, _read_chat)
        except RequestRefused as refusal:
            named = [name for name in _OPTIONAL if name in body and name in str(refusal)]
            suspects = named or [name for name in ("response_format",) if name in body]
            if not suspects:
                raise
            reply = await self._chat(_without(body, suspects[0]))  # raises where that was not the reason
            if suspects[0] not in self._left_out:
                self._left_out.add(suspects[0])
                print(f"The server does not take {suspects[0]} ({refusal}); it is asked without.", file=sys.stderr)
            return reply

    def _open(self) -> None:
        from openai import AsyncOpenAI

        key = os.environ.get(KEY_VARIABLE)
        self._given_up = None
        self._servers = []
        for url in self.urls:
            if key and urlsplit(url).scheme == "http" and urlsplit(url).hostname not in LOCAL_HOSTS:
                print(f"warning: {KEY_VARIABLE} goes to {url} unencrypted.", file=sys.stderr)
            # Local servers need no key, but the library needs one.
            client = AsyncOpenAI(
                base_url=url, api_key=key or "none", timeout=self.timeout, max_retries=self.retries,
            )  # fmt: skip
            self._servers.append(Server(url, client))

    async def _close(self, at_work: Iterable[asyncio.Task[Any]]) -> None:
        tasks = list(at_work)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            await server.client.close()


_ADVICE = {
    401: f"set {KEY_VARIABLE} in the environment to a key that it takes",
    403: f"check what the key in {KEY_VARIABLE} may do",
    404: "check --endpoint, which ends with the API's version (/v1), and --endpoint_model",
}


def _answer_of(error: Any) -> str:
    """Status and message of an answer that is an error."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else body
    return f"{error.status_code} ({_short(str(message or error.message))})"


def _without(body: dict[str, Any], name: str) -> dict[str, Any]:
    """The request without an option, or with its other name."""
    other = _OPTIONAL[name]
    renamed = {other: body[name]} if other and name in body else {}
    return {key: value for key, value in body.items() if key != name} | renamed


def _read_chat(answer: Any) -> Reply:
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"]
        usage = answer.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(answer if isinstance(answer, str) else json.dumps(answer)) from error
    if content is not None and not isinstance(content, str):
        raise ValueError(f"content is {type(content).__name__}")
    # A model that thought until its tokens were used up has said nothing; half a surrogate pair cannot be written.
    text = (content or "").encode("utf-8", "replace").decode()
    return Reply(text, str(choice.get("finish_reason") or "stop"), *tokens)


def _short(text: str) -> str:
    text = " ".join(redacted(text).split())
    return text if len(text) <= 300 else text[:297] + "..."
