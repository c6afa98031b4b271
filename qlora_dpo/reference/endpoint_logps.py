"""Per-token log-probs of completions from OpenAI-compatible servers, in whatever way each of them can tell them."""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.endpoint import Endpoint, NoSuchRoute, RequestRefused, Server
from qlora_dpo.errors import EndpointError
from qlora_dpo.reference.served_tokens import (
    DIALECTS,
    Dialect,
    LogpsRequest,
    NotTheseTokens,
    ServedTokens,
    completion_logps,
)
from qlora_dpo.reference.store import Logps


class EndpointLogps:
    """Asks the servers of an endpoint; `text_of` gives the text of a token id.

    Which way a server is asked in is found with the first request that it gets.
    """

    def __init__(self, endpoint: Endpoint, text_of: Callable[[int], str]) -> None:
        self._endpoint, self._text_of = endpoint, text_of
        self._dialects: dict[str, Dialect] = {}
        self._finding: dict[str, asyncio.Lock] = {}

    @property
    def may_need_messages(self) -> bool:
        """Whether a server takes, or may turn out to take, only conversations."""
        known = self._dialects.values()
        return len(known) < len(self._endpoint.urls) or any(dialect.renders for dialect in known)

    def __call__(self, requests: Iterable[LogpsRequest]) -> Iterator[tuple[LogpsRequest, Logps | RefusedRow]]:
        """Yield each request with the log-probs of its completion, or with why there are none, as they come.

        Raises:
            EndpointError: no server gives log-probs, or one scores other tokens than it is sent.
        """
        self._finding = defaultdict(asyncio.Lock)
        yield from self._endpoint.results(requests, self._ask)

    async def _ask(self, request: LogpsRequest) -> Logps | RefusedRow:
        try:
            server, dialect, served = await self._endpoint.ask_one(lambda server: self._ask_server(server, request))
            return completion_logps(request, served, dialect, self._text_of)
        except RequestRefused as refusal:
            return RefusedRow(request.origin, request.field, f"the server refuses it ({refusal})")
        except NotTheseTokens as error:
            if dialect.renders:
                return RefusedRow(request.origin, request.field, f"the server makes other tokens of it ({error})")
            raise EndpointError(
                f"{request.origin}: {request.field}: {error} ({server.url}, {dialect.name}). Its log-probs cannot be "
                "used: serve the model with the tokenizer that it has here. What was answered before is kept."
            ) from error

    async def _ask_server(self, server: Server, request: LogpsRequest) -> tuple[Server, Dialect, ServedTokens]:
        """The server's answer, and the way that it was asked in."""
        if server.url not in self._dialects:
            async with self._finding[server.url]:
                if server.url not in self._dialects:
                    return await self._find_dialect(server, request)
        dialect = self._dialects[server.url]
        return server, dialect, await self._send(server, dialect, request, partial(_read_all, dialect, request))

    async def _find_dialect(self, server: Server, request: LogpsRequest) -> tuple[Server, Dialect, ServedTokens]:
        """Ask in one way after the other, and remember the first that brings log-probs."""
        refusals: list[RequestRefused] = []
        reasons: list[str] = []
        for dialect in DIALECTS:
            if dialect.renders and request.messages is None:
                continue
            try:
                served = await self._send(server, dialect, request, partial(_read, dialect, request))
            except RequestRefused as refusal:
                refusals.append(refusal)
                reasons.append(f"{dialect.name}: {refusal}")
                continue
            except NoSuchRoute as error:
                reasons.append(f"{dialect.name}: {error}")
                continue
            if served is not None:
                self._dialects[server.url] = dialect
                print(f"{server.url} is asked for {dialect.name}.", file=sys.stderr)
                return server, dialect, served
            reasons.append(f"{dialect.name}: an answer without them")
        if len(refusals) == len(reasons):  # this row may be too long, or hold what is not accepted
            raise refusals[0]
        told = "\n".join(f"  {reason}" for reason in reasons)
        raise EndpointError(
            f"{server.url} gives no log-probs of a text that it is sent:\n{told}\nvLLM does; for another server see "
            "whether it knows prompt_logprobs, or echo with logprobs."
        )

    async def _send(self, server: Server, dialect: Dialect, request: LogpsRequest, read: Callable[[Any], Any]) -> Any:
        body = {"model": self._endpoint.model} | dialect.body(request)
        return await self._endpoint.send(server, dialect.path, body, read)


def _read(dialect: Dialect, request: LogpsRequest, answer: Any) -> ServedTokens | None:
    return dialect.read(answer, request)


def _read_all(dialect: Dialect, request: LogpsRequest, answer: Any) -> ServedTokens:
    served = dialect.read(answer, request)
    if served is None:
        raise ValueError("the log-probs of the prompt are left out")
    return served
