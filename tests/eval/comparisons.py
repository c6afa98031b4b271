"""Comparisons made by hand."""

from __future__ import annotations

from typing import Any

from eval.answers import Answer, Row, Sample


def answer(text: str = "w3 w4", **changes: Any) -> Answer:
    values: dict[str, Any] = {
        "text": text, "tokens": len(text.split()) + 1, "finish_reason": "stop", "logp": -2.0, "logp_per_token": -1.0,
        "logp_policy": -2.0, "logp_reference": -2.0, "reward": 0.0, "seconds": 0.5,
    }  # fmt: skip
    return Answer(**values | changes)


def row(number: int = 0, before: Answer | str = "w3", after: Answer | str = "w4", **changes: Any) -> Row:
    values: dict[str, Any] = {
        "id": f"{number:016x}", "prompt": f"w{number}", "category": None, "reference_answer": None,
        "origin": f"prompts.jsonl:{number + 1}", "seed": number,
        "before": before if isinstance(before, Answer) else answer(before),
        "after": after if isinstance(after, Answer) else answer(after),
    }  # fmt: skip
    return Row(**values | changes)


def sample(tokens: int, policy: float, reference: float) -> Sample:
    return Sample(tokens, "stop", policy, reference)
