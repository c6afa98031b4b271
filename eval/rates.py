"""What goes wrong with answers, as shares of them: refusals, repetition, no end, no text, lost facts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from eval.answers import Answer, Row
from eval.statistics import mean
from qlora_dpo.labeling.candidates import Candidates
from qlora_dpo.labeling.rule_kinds import Refusal, Repetition
from qlora_dpo.reference.intervals import wilson

_EDGES = " \t\n.。!！?？,，;；:：\"'“”‘’「」"  # of a fact, which do not count
_refuses, _repeats = Refusal(), Repetition()
_NO_PROMPT = Candidates("", ())  # neither rule looks at it


def rates(answers: Sequence[Answer]) -> dict[str, float]:
    """Shares of one side's answers.

    `repetition` is the mean share of an answer's 4-grams that stood in it before (arXiv 1908.04319); the others are
    shares of answers.
    """
    return {
        "refusal": mean([_refuses(_NO_PROMPT, answer.text) for answer in answers]),
        "repetition": mean([_repeats(_NO_PROMPT, answer.text) for answer in answers]),
        "missing_end": mean([float(answer.finish_reason == "length") for answer in answers]),
        "empty": mean([float(not answer.text.strip()) for answer in answers]),
        "mean_tokens": mean([float(answer.tokens) for answer in answers]),
    }


def facts(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How many answers state their fact, before and after, and how many of those right before still do (`kept`, with
    its interval); None where no prompt has a fact."""
    known = [(contains(row.before.text, row.fact), contains(row.after.text, row.fact)) for row in rows if row.fact]
    if not known:
        return None
    right, still = sum(before for before, _ in known), sum(before and after for before, after in known)
    return {
        "prompts": len(known),
        "before": right / len(known),
        "after": sum(after for _, after in known) / len(known),
        "right_before": right,
        "still_right": still,
        "kept": still / right if right else None,
        "kept_interval": wilson(still, right) if right else None,
    }


def contains(answer: str, fact: str) -> bool:
    """Whether an answer has a fact in it, whatever the case, width and spaces, and not as a part of another word or
    number."""
    wanted = re.escape(_normalized(fact).strip(_EDGES)).replace("\\ ", " ")
    before = r"(?<![a-z0-9-])(?<!\d[.,])" if re.match(r"[a-z0-9]", wanted) else ""
    after = r"(?![a-z0-9])(?![.,]\d)" if re.search(r"[a-z0-9]$", wanted) else ""
    return bool(wanted) and re.search(before + wanted + after, _normalized(answer)) is not None


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
