"""Thoughts: how models mark what they think before an answer, and taking a thought and its answer apart."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """The texts around a thought."""

    open: str
    close: str


THOUGHT_TAGS = (
    ThoughtTags("<think>", "</think>"),  # DeepSeek-R1, Qwen3, GLM, Nemotron-3, SmolLM3
    ThoughtTags("<thinking>", "</thinking>"),
    ThoughtTags("[THINK]", "[/THINK]"),  # Magistral
    ThoughtTags("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning, Command-R7B
    ThoughtTags("◁think▷", "◁/think▷"),  # Kimi
    ThoughtTags("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThoughtTags("<reasoning>", "</reasoning>"),
    ThoughtTags("<thought>", "</thought>"),
)
_INLINE = re.compile(
    r"\s*(?:"
    + "|".join(
        f"(?P<open{number}>{re.escape(tags.open)})(?P<thought{number}>.*?)(?P<close{number}>{re.escape(tags.close)})"
        for number, tags in enumerate(THOUGHT_TAGS)
    )
    + r")",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class InlineThought:
    """An answer that begins with a thought between tags."""

    tags: ThoughtTags
    thought: str
    answer: str


def inline_thought(content: str) -> InlineThought | None:
    """The thought that a text begins with, also where the prompt wrote its opening; None where it begins with none."""
    match = _INLINE.match(content)
    if match is None:
        for tags in THOUGHT_TAGS:
            thought, closed, answer = content.partition(tags.close)
            if closed and tags.open not in thought:
                return InlineThought(tags, thought, answer)
        return None
    number = next(number for number in range(len(THOUGHT_TAGS)) if match[f"open{number}"])
    return InlineThought(THOUGHT_TAGS[number], match[f"thought{number}"], content[match.end() :])


def opened_thought(prompt: str) -> tuple[int, ThoughtTags] | None:
    """Where the thought begins that a generation prompt ends in, and its tags; None where it opens none."""
    end = len(prompt.rstrip())
    for tags in THOUGHT_TAGS:
        if prompt.endswith(tags.open, 0, end):
            return end - len(tags.open), tags
    return None
