"""How many wait for their turn: so many in all, and so many of one address, so that none takes every place."""

from __future__ import annotations

from typing import Any

MAX_WAITING = 32  # requests in the queue
OF_ONE_ADDRESS = 16


def share_queue(blocks: Any) -> None:
    """Set up the queue of a Gradio page: one request at a time, and places that no address has for itself alone."""
    blocks.queue(max_size=MAX_WAITING, default_concurrency_limit=1, api_open=False)
    queue = blocks._queue
    push = queue.push

    async def fair(body: Any, request: Any, username: str | None) -> Any:
        if sum(_address(event.request) == _address(request) for event in _waiting(queue)) >= OF_ONE_ADDRESS:
            return False, f"The queue is full for you: {OF_ONE_ADDRESS} requests from your address wait.", "queue_full"
        return await push(body, request, username)

    queue.push = fair


def _waiting(queue: Any) -> list[Any]:
    return [event for one in queue.event_queue_per_concurrency_id.values() for event in one.queue]


def _address(request: Any) -> str:
    return request.client.host if request.client else ""
