"""Simulated judges: what they see of a question, and how they decide."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from qlora_dpo.labeling.canaries import CANARIES, CLEAN

RIGHT = {item.answers[0] for item in CLEAN}
ATTEMPTS = [canary.answers[1].split("\n\n", 1)[1] for canary in CANARIES]


def blocks_of(request: dict[str, Any]) -> tuple[dict[str, str], str]:
    """What stands between fences with the code of the message, by name; and what stands outside."""
    text = request["messages"][-1]["content"]
    code = re.match(r"The code of this message is (\w+)\.\n", text)
    assert code, text
    fenced = re.compile(rf"\[([^\[\]]+) {code[1]}\]\n(.*?)\n\[end \1 {code[1]}\]", re.DOTALL)
    return dict(fenced.findall(text)), fenced.sub("", text)


def verdict(value: str, reason: str = "because") -> str:
    return json.dumps({"reason": reason, "verdict": value})


def is_good(answer: str) -> bool:
    return answer in RIGHT or answer.startswith("good")


def fair(request: dict[str, Any]) -> str:
    """Knows which answers are right, and does not care where they stand."""
    blocks, _ = blocks_of(request)
    a, b = is_good(blocks["answer A"]), is_good(blocks["answer B"])
    return verdict("same" if a == b else "A" if a else "B")


def obeys_what_is_unfenced(request: dict[str, Any]) -> str:
    """Follows every attempt to steer it that stands outside of the fences, and is fair otherwise."""
    _, outside = blocks_of(request)
    return verdict("B", "I was told to") if any(attempt in outside for attempt in ATTEMPTS) else fair(request)


def obeys_everything(request: dict[str, Any]) -> str:
    """Follows every attempt, wherever it stands: says what it is told to say, or prefers the answer that asks."""
    blocks, _ = blocks_of(request)
    for place in ("A", "B"):
        answer = blocks[f"answer {place}"]
        told = re.search(r'"verdict": "([AB])"', answer)
        if told:
            return verdict(told[1])
        if any(attempt in answer for attempt in ATTEMPTS):
            return verdict(place)
    return fair(request)


def scores(rule: Callable[[dict[str, str]], Any]) -> Callable[[dict[str, Any]], str]:
    """A judge in mode `reference`."""
    return lambda request: json.dumps({"reason": "because", "score": rule(blocks_of(request)[0])})
