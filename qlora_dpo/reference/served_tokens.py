"""Three ways to ask a server for the log-probs of given tokens, one form for its answers, and what is not believed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qlora_dpo.data.preferences import Message
from qlora_dpo.reference.store import Logps, completion_key

_LEAST = -9999.0  # vLLM writes this for minus infinity
_MOST = 1e-3  # a rounding above 0
_BY_ID = "token_id:"


@dataclass(frozen=True, slots=True)
class LogpsRequest:
    """One completion whose log-probs are asked for; `field` says which answer of the row at `origin` it is."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    origin: str
    field: str
    messages: Sequence[Message] | None = None
    """The same as a conversation, for a server that takes only these."""

    @property
    def key(self) -> bytes:
        """What the completion is called in a store."""
        return completion_key(self.prompt_ids, self.completion_ids)

    @property
    def ids(self) -> list[int]:
        """All tokens that are sent."""
        return [*self.prompt_ids, *self.completion_ids]


class ServedToken(NamedTuple):
    """What a server says about a token: its id, or where that is not told its text, and its log-prob."""

    id: int | None
    text: str | None
    logp: Any


ServedTokens = list[ServedToken | None]


class NotTheseTokens(Exception):
    """The server scored something else than was sent, or did not score it."""


@dataclass(frozen=True)
class Dialect:
    """One way to ask. `read` gives None for an answer of the API in which these log-probs are left out."""

    name: str
    path: str
    body: Callable[[LogpsRequest], dict[str, Any]]
    read: Callable[[Any, LogpsRequest], ServedTokens | None]
    renders: bool = False
    """The server makes the ids itself, out of messages: they may differ in some rows."""


def _with_prompt_logprobs(request: LogpsRequest) -> dict[str, Any]:
    return {"prompt": request.ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}


def _with_echo(request: LogpsRequest) -> dict[str, Any]:
    # Some servers read 0 as "no log-probs".
    return {
        "prompt": request.ids, "max_tokens": 1, "temperature": 1.0, "echo": True, "logprobs": 1,
        "return_tokens_as_token_ids": True,
    }  # fmt: skip


def _with_messages(request: LogpsRequest) -> dict[str, Any]:
    return {
        "messages": list(request.messages or ()), "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0,
        "add_generation_prompt": False,
    }  # fmt: skip


def _read_completion(answer: Any, request: LogpsRequest) -> ServedTokens | None:
    return _by_id(_choice(answer).get("prompt_logprobs"))


def _read_chat(answer: Any, request: LogpsRequest) -> ServedTokens | None:
    choice = _choice(answer)
    return _by_id(answer.get("prompt_logprobs", choice.get("prompt_logprobs")))


def _read_echo(answer: Any, request: LogpsRequest) -> ServedTokens | None:
    told = _choice(answer).get("logprobs")
    if not told:
        return None
    try:
        pairs = list(zip(told["tokens"], told["token_logprobs"], strict=True))
        # Behind the echo stands the token that the server wrote; the number that it read says whether it is there.
        read = (answer.get("usage") or {}).get("prompt_tokens") or len(request.ids)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"logprobs that are no lists of equal length ({error})") from error
    if len(pairs) == 1 < len(request.ids):
        return None  # the token that the server wrote: it does not echo
    return [_by_name(str(token), logp) for token, logp in (pairs[:-1] if len(pairs) == read + 1 else pairs)]


def _choice(answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(str(answer)[:300]) from error
    if not isinstance(choice, dict):
        raise ValueError(f"a choice that is {type(choice).__name__}")
    return choice


def _by_id(rows: Any) -> ServedTokens | None:
    """vLLM's form: for each token its id, the log-prob, the text; nothing for the first."""
    if rows is None:
        return None
    try:
        return [None if row is None else _first(row) for row in rows]
    except (AttributeError, TypeError, ValueError, StopIteration) as error:
        raise ValueError(f"prompt_logprobs that are none ({error})") from error


def _first(row: dict[str, dict[str, Any]]) -> ServedToken:
    # The token of the prompt stands first; likelier ones may follow.
    token, told = next(iter(row.items()))
    return ServedToken(int(token), told.get("decoded_token"), told.get("logprob"))


def _by_name(token: str, logp: Any) -> ServedToken:
    number = token.removeprefix(_BY_ID)
    is_id = token.startswith(_BY_ID) and number.isdecimal()
    return ServedToken(int(number), None, logp) if is_id else ServedToken(None, token, logp)


DIALECTS = (
    Dialect("prompt_logprobs of token ids", "/completions", _with_prompt_logprobs, _read_completion),
    Dialect("echo with logprobs of token ids", "/completions", _with_echo, _read_echo),
    Dialect("prompt_logprobs of messages", "/chat/completions", _with_messages, _read_chat, renders=True),
)


def completion_logps(
    request: LogpsRequest, served: ServedTokens, dialect: Dialect, text_of: Callable[[int], str]
) -> Logps:
    """The log-probs of the completion's tokens, once every token is the one that was sent.

    Raises:
        NotTheseTokens: one is not, one is missing, or its log-prob is none.
    """
    ids, prompt = request.ids, len(request.prompt_ids)
    for place, (sent, token) in enumerate(zip(ids, served, strict=False)):
        if token is None and place:
            raise NotTheseTokens(f"{_place(request, place)} is left out")
        if token is not None and not _is_same(sent, token, text_of):
            raise NotTheseTokens(
                f"{_place(request, place)} is {_sent(sent, text_of)}, but the server has {_had(token)}"
            )
    # Behind a rendered conversation the template may write something more.
    if len(served) < len(ids) or (len(served) > len(ids) and not dialect.renders):
        raise NotTheseTokens(f"the server scored {len(served)} tokens of {len(ids)} that it was sent")
    values = [None if token is None else token.logp for token in served[prompt : len(ids)]]
    for place, value in enumerate(values, prompt):
        if not _is_logp(value):
            raise NotTheseTokens(f"{_place(request, place)} has {value} for its log-prob")
    if len(values) > 1 and not any(values):
        raise NotTheseTokens("the server gives 0.0 for every token, which is what stands for no log-prob at all")
    return np.array(values, np.float32)


def _is_logp(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and _LEAST < value <= _MOST


def _is_same(sent: int, token: ServedToken, text_of: Callable[[int], str]) -> bool:
    if token.id is not None:
        return token.id == sent
    expected, text = text_of(sent).strip(), (token.text or "").strip(" \n\t▁Ġ")
    # Half a character, a byte or a control token has no text to compare.
    is_blank = not text or not expected or "\ufffd" in text + expected or text.startswith("<0x")
    return is_blank or text == expected


def _place(request: LogpsRequest, place: int) -> str:
    own = place - len(request.prompt_ids)
    where = f"token {own + 1} of the answer" if own >= 0 else "of the prompt"
    return f"token {place + 1} of {len(request.ids)} ({where})"


def _sent(token: int, text_of: Callable[[int], str]) -> str:
    return f"{text_of(token)!r} (id {token})"


def _had(token: ServedToken) -> str:
    return f"{token.text!r}" + ("" if token.id is None else f" (id {token.id})")
