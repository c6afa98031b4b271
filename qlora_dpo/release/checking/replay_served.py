"""The same prompts to an OpenAI-compatible server: the ids that it made of them, its answers, its log-probs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from qlora_dpo.data.preferences import Message, RefusedRow
from qlora_dpo.endpoint import Endpoint, RequestRefused
from qlora_dpo.errors import EndpointError, UsageError
from qlora_dpo.reference.endpoint_logps import EndpointLogps
from qlora_dpo.reference.served_tokens import LogpsRequest
from qlora_dpo.release.checking.replay import Answer, Expected

_TELLING = {"return_token_ids": True}  # vLLM's; others may refuse it


def served_answers(
    server: str, model: str | None, prompts: Sequence[Sequence[Message]], expected: Expected
) -> list[Answer | Exception]:
    """Greedy answers of the server, which renders the prompts itself; the exception where it refuses one.

    Raises:
        UsageError: the address cannot be used, or the server has more than one model.
        EndpointError: no answer comes.
    """
    endpoint = Endpoint([server], model or only_model(server))

    async def ask(number: int) -> Answer | Exception:
        body = {
            "model": endpoint.model, "messages": list(prompts[number]), "max_tokens": expected.max_new_tokens,
            "temperature": 0.0,
        }  # fmt: skip
        try:
            return await endpoint.post("/chat/completions", body | _TELLING, _reader(expected))
        except RequestRefused:
            pass
        try:
            return await endpoint.post("/chat/completions", body, _reader(expected))
        except RequestRefused as refusal:
            return refusal

    found = dict(endpoint.results(range(len(prompts)), ask))
    logps = _logps(endpoint, prompts, expected)
    answers = [found[number] for number in range(len(prompts))]
    return [
        replace(answer, logps=logps[number]) if isinstance(answer, Answer) and number in logps else answer
        for number, answer in enumerate(answers)
    ]


def only_model(server: str) -> str:
    """The name of the one model that the server lists.

    Raises:
        UsageError: it has several.
        EndpointError: it does not answer.
    """
    import os

    from openai import OpenAI, OpenAIError

    from qlora_dpo.endpoint import KEY_VARIABLE

    try:
        with OpenAI(base_url=server, api_key=os.environ.get(KEY_VARIABLE) or "none") as client:
            names = [model.id for model in client.models.list()]
    except (OpenAIError, ValueError) as error:
        raise EndpointError(
            f"--server {server} does not say which models it has ({error}). See to the server."
        ) from error
    if len(names) != 1:
        raise UsageError(
            f"--server {server} has the models {', '.join(names) or 'none'}: name one with --server_model."
        )
    return names[0]


def _reader(expected: Expected) -> Any:
    def read(answer: Any) -> Answer:
        try:
            choice = answer["choices"][0]
            text = str(choice["message"]["content"] or "")
            ended = choice.get("finish_reason") == "stop"
            ids = tuple(choice.get("token_ids") or ())
            prompt_ids = tuple(answer.get("prompt_token_ids") or ())
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(str(answer)[:300]) from error
        if ids and ended and ids[-1] != expected.end_id:
            ids = (*ids, expected.end_id)  # some leave it out
        return Answer(prompt_ids, ids, text.strip(), ended)

    return read


def _logps(
    endpoint: Endpoint, prompts: Sequence[Sequence[Message]], expected: Expected
) -> dict[int, tuple[float, ...]]:
    """Log-probs of the adapter's answers, by the number of the prompt; none where the server does not tell them."""
    requests = [
        LogpsRequest(answer.prompt_ids, answer.ids, f"prompt {number + 1}", "answer")
        for number, answer in enumerate(expected.answers)
    ]
    numbers = {id(request): number for number, request in enumerate(requests)}
    asked = EndpointLogps(endpoint, lambda id_: str(expected.tokenizer.decode([id_])))
    found: dict[int, tuple[float, ...]] = {}
    refused: list[RefusedRow] = []
    try:
        for request, values in asked(requests):
            if isinstance(values, RefusedRow):
                refused.append(values)
            else:
                found[numbers[id(request)]] = tuple(float(value) for value in values)
    except EndpointError as error:
        print(f"Its log-probs are not compared: {error}", file=sys.stderr)
    if refused:
        told = f"{len(refused)} of {len(requests)} answers"
        print(f"Its log-probs of {told} are not compared: {refused[0]}", file=sys.stderr)
    return found
