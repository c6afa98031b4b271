"""A small server that speaks the OpenAI API (`/v1/chat/completions`, `/v1/completions`; log-probs of a prompt as vLLM
gives them, or by `echo`) and has the faults of real ones.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS: dict[str, tuple[int, dict[str, str], bytes]] = {
    "429": (429, {"Retry-After": "0.05"}, b'{"error": {"message": "too many requests"}}'),
    "500": (500, {}, b'{"error": {"message": "internal error"}}'),
    "503": (503, {"Content-Type": "text/html"}, b"<html>the model is loading</html>"),
    "html": (200, {"Content-Type": "text/html"}, b"<html><body>log in to the network</body></html>"),
    "broken_json": (200, {}, b'{"choices": [{"message": {"cont'),
    "no_choices": (200, {}, b'{"choices": []}'),
    "error_in_200": (200, {}, b'{"error": {"message": "out of memory"}}'),
    "400": (400, {}, b'{"error": {"message": "the prompt is longer than the maximum context length"}}'),
    "401": (401, {}, b'{"error": {"message": "Incorrect API key provided: sk-0123456789abcdefghij"}}'),
    "404": (404, {}, b'{"error": {"message": "the model `m` does not exist"}}'),
}
"""Status, headers and body of an answer that is a fault. `timeout` and `disconnect` have none."""

Rows = list[tuple[int, float | None]]
SPOILED: dict[str, Callable[[Rows], Rows]] = {
    "fewer_tokens": lambda rows: rows[:-1],
    "more_tokens": lambda rows: [*rows, rows[-1], rows[-1]],
    "other_ids": lambda rows: [*rows[:-1], (rows[-1][0] + 1, rows[-1][1])],
    "null": lambda rows: [*rows[:-1], (rows[-1][0], None)],
    "nan": lambda rows: [*rows[:-1], (rows[-1][0], math.nan)],
    "minus_infinity": lambda rows: [*rows[:-1], (rows[-1][0], -9999.0)],
    "positive": lambda rows: [*rows[:-1], (rows[-1][0], 0.5)],
    "zeros": lambda rows: [(token, 0.0) for token, _ in rows],
}
"""What a fault makes of the tokens of a prompt and their log-probs."""

Answer = Callable[[dict[str, Any]], str]


def made_up(ids: Sequence[int]) -> list[float]:
    """A log-prob for each token, by its id."""
    return [-math.log(2 + token % 7) for token in ids]


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError | json.JSONDecodeError):  # a client that was killed
            super().handle_error(request, client_address)


class OpenAIServer:
    """Answers on 127.0.0.1 in threads while its block lasts; counts and keeps what it was asked.

    `faults` are the answers to the first requests, by name, None for a good one; `fault` may decide by the request.
    `knows` are the ways to ask for log-probs of a prompt: prompt_logprobs, echo, token_ids (echo names tokens by id);
    what it does not know it ignores, or refuses. `logps` gives the log-prob of each token, `render` the ids of a chat.
    """

    def __init__(
        self,
        answer: Answer = lambda request: "fine",
        *,
        faults: Sequence[str | None] = (),
        fault: Callable[[dict[str, Any]], str | None] = lambda request: None,
        delay: float | Callable[[], float] = 0.0,
        usage: bool = True,
        knows: Collection[str] = ("prompt_logprobs", "echo", "token_ids"),
        refuses_unknown: bool = False,
        routes: Collection[str] = ("/completions", "/chat/completions"),
        logps: Callable[[Sequence[int]], Sequence[float]] = made_up,
        render: Callable[[list[dict[str, str]]], list[int]] | None = None,
        text_of: Callable[[int], str] = "w{}".format,
    ) -> None:
        self.answer, self.faults, self.fault, self.delay, self.usage = answer, list(faults), fault, delay, usage
        self.knows, self.refuses_unknown, self.routes = knows, refuses_unknown, routes
        self.logps, self.render, self.text_of = logps, render, text_of
        self.requests: list[dict[str, Any]] = []
        self.in_flight_at: list[tuple[float, int]] = []
        """(seconds, requests at work) whenever that number changed."""
        self.headers: list[dict[str, str]] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._dead = False
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """The address for --endpoint."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def die(self) -> None:
        """Answer nobody any more, as a process that was killed."""
        self._dead = True
        threading.Thread(target=self.__exit__).start()

    def mean_in_flight(self) -> float:
        """Requests at work on average, from the first moment of most to the moment when the last one came."""
        full = next(place for place, (_, count) in enumerate(self.in_flight_at) if count == self.most_in_flight)
        steps = list(zip(self.in_flight_at[full:], self.in_flight_at[full + 1 :], strict=False))
        last = max(place for place, ((_, count), (_, then)) in enumerate(steps) if then > count)
        spans = [(after - before, count) for (before, count), (after, _) in steps[:last]]
        return sum(seconds * count for seconds, count in spans) / sum(seconds for seconds, _ in spans)

    def texts(self) -> list[str]:
        """What the user said in each chat request."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def _begin(self, request: dict[str, Any], headers: dict[str, str]) -> str | None:
        """Count a request; the name of its fault."""
        with self._lock:
            self.requests.append(request)
            self.headers.append(headers)
            self._in_flight += 1
            self.in_flight_at.append((time.monotonic(), self._in_flight))
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
            return (self.faults.pop(0) if self.faults else None) or self.fault(request)

    def _end(self) -> None:
        with self._lock:
            self._in_flight -= 1
            self.in_flight_at.append((time.monotonic(), self._in_flight))

    def _refusal(self, path: str, request: dict[str, Any]) -> str | None:
        """The fault that this request always has here."""
        if path.removeprefix("/v1") not in self.routes:
            return "404"
        unknown = {"prompt_logprobs", "echo"} - set(self.knows)
        return "400" if self.refuses_unknown and unknown & request.keys() else None

    def _body(self, path: str, request: dict[str, Any], spoil: Callable[[Rows], Rows]) -> dict[str, Any]:
        is_chat = path.endswith("/chat/completions")
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        body: dict[str, Any] = {"id": "1", "object": "completion", "choices": [choice]}
        if is_chat:
            text = self.answer(request)
            choice["message"] = {"role": "assistant", "content": text}
            ids = self.render(request["messages"]) if self.render else []
        else:
            text, ids = "", request["prompt"]
            choice["text"] = text
        rows: Rows = spoil(list(zip(ids, [None, *self.logps(ids)[1:]], strict=True)) if ids else [])
        tokens = sum(len(message["content"].split()) for message in request["messages"]) if is_chat else len(rows)
        if "prompt_logprobs" in request and "prompt_logprobs" in self.knows:
            (body if is_chat else choice)["prompt_logprobs"] = self._prompt_logprobs(rows)
        if request.get("echo") and "echo" in self.knows:
            choice["logprobs"] = self._echoed(rows)
        written = len(text.split())
        return body | ({"usage": {"prompt_tokens": tokens, "completion_tokens": written}} if self.usage else {})

    def _prompt_logprobs(self, rows: Rows) -> list[dict[str, Any] | None]:
        """vLLM's form: nothing for the first token, then the log-prob of each token by its id."""
        return [
            {str(token): {"logprob": logp, "rank": 1, "decoded_token": self.text_of(token)}} if place else None
            for place, (token, logp) in enumerate(rows)
        ]

    def _echoed(self, rows: Rows) -> dict[str, Any]:
        """The older form of completions: lists, with the written token at the end."""
        named = "token_id:{}".format if "token_ids" in self.knows else self.text_of
        return {
            "tokens": [*(named(token) for token, _ in rows), named(2)],
            "token_logprobs": [*(logp for _, logp in rows), -0.5],
        }

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else the body waits 40 ms for the acknowledgement of the headers

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fault = outer._begin(request, {name.lower(): value for name, value in self.headers.items()})
                fault = fault or outer._refusal(self.path, request)
                try:
                    time.sleep(outer.delay() if callable(outer.delay) else outer.delay)
                    if fault == "timeout":
                        outer._closing.wait(30)
                    if fault in {"timeout", "disconnect"} or outer._dead:
                        self.close_connection = True
                        return
                    if fault in FAULTS:
                        self._send(*FAULTS[fault])
                    else:
                        body = outer._body(self.path, request, SPOILED.get(fault or "", list))
                        self._send(200, {}, json.dumps(body).encode())
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client was killed, or did not want to wait
                finally:
                    outer._end()

            def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
