"""The answers before and after that the page shows: a few of each place where a run keeps some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from eval.answers import Answer, Verdict
from eval.answers import Row as Answered
from eval.report.run import Comparison, Run
from eval.report.svg import short

MOST = 12  # prompts of one place
MOST_CHARACTERS = 1500  # of a text

Words = Callable[..., str]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Text:
    """A text as far as it is shown, and what is said about it."""

    shown: str
    more: int = 0
    """Characters that are not shown."""
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt with two answers."""

    prompt: Text
    before: Text
    after: Text
    category: str | None = None
    reference: Text | None = None
    verdicts: tuple[tuple[str, str], ...] = ()
    """Method, and before, after or tie."""
    earlier: tuple[tuple[int, Text], ...] = ()
    """Steps before the last, and the answers then."""


@dataclass(frozen=True)
class Group:
    """Samples of one place."""

    title: str
    of: int
    """How many there are."""
    samples: tuple[Sample, ...]
    facts: tuple[tuple[str, str], ...] = field(default=())


def sample_groups(run: Run, words: Words) -> list[Group]:
    """Of the comparison, of the demo, and of the evaluations while the run trained."""
    found = [_of_comparison(run.comparison, words), _of_demo(run.demo, words), _of_training(run.samples, words)]
    return [group for group in found if group is not None]


def text(value: Any, facts: Iterable[str] = ()) -> Text:
    """A text, or a conversation as text."""
    if isinstance(value, list | tuple):
        value = "\n\n".join(
            f"{turn.get('role', '?')}: {turn.get('content', '')}" if isinstance(turn, dict) else str(turn)
            for turn in value
        )
    whole = "" if value is None else str(value)
    return Text(whole[:MOST_CHARACTERS], max(0, len(whole) - MOST_CHARACTERS), tuple(facts))


def spread(items: Sequence[Kind], category: Callable[[Kind], Any], most: int = MOST) -> list[Kind]:
    """At most so many items: the first of each category, then the second of each, and so on."""
    groups: dict[Any, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(str(category(item)), []).append(place)
    turns = sorted((turn, members[turn]) for members in groups.values() for turn in range(len(members)))
    return [items[place] for place in sorted(place for _, place in turns[:most])]


def _of_comparison(comparison: Comparison | None, words: Words) -> Group | None:
    if comparison is None or not comparison.rows:
        return None
    verdicts: dict[str, list[Verdict]] = {}
    for verdict in comparison.verdicts:
        verdicts.setdefault(verdict.id, []).append(verdict)
    chosen = spread(comparison.rows, lambda row: row.category)
    samples = tuple(_compared(row, verdicts.get(row.id, []), words) for row in chosen)
    return Group(words("samples_comparison"), len(comparison.rows), samples)


def _compared(row: Answered, verdicts: Sequence[Verdict], words: Words) -> Sample:
    return Sample(
        prompt=text(row.prompt),
        before=text(row.before.text, _facts(row.before, words)),
        after=text(row.after.text, _facts(row.after, words)),
        category=row.category,
        reference=text(row.reference_answer) if row.reference_answer else None,
        verdicts=tuple((verdict.method, verdict.winner) for verdict in verdicts),
    )


def _facts(answer: Answer, words: Words) -> list[str]:
    return [
        words("tokens", count=f"{answer.tokens:,}") + ("" if answer.finish_reason == "stop" else words("cut_off")),
        words("logp_fact", value=short(answer.logp_per_token)),
        words("reward_fact", value=short(answer.reward)),
    ]


def _of_demo(demo: dict[str, Any], words: Words) -> Group | None:
    answers = demo.get("answers")
    rows = [row for row in answers if isinstance(row, dict)] if isinstance(answers, list) else []
    if not rows:
        return None
    samples = tuple(_plain(row) for row in spread(rows, lambda row: row.get("category")))
    facts = tuple(
        (name.replace("_", " "), short(value)) for name, value in demo.items() if isinstance(value, int | float)
    )
    return Group(words("samples_demo"), len(rows), samples, facts)


def _of_training(rows: Sequence[dict[str, Any]], words: Words) -> Group | None:
    """The prompts of --sample_generate: the last answers, and how they came about."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(str(row.get("prompt", "")), []).append(row)
    if not prompts:
        return None
    samples = []
    for versions in list(prompts.values())[:MOST]:
        earlier = tuple((row.get("step", 0), text(row.get("after"))) for row in versions[:-1])
        samples.append(_plain(versions[-1], earlier, (words("at_step", step=versions[-1].get("step", 0)),)))
    return Group(words("samples_training"), len(prompts), tuple(samples))


def _plain(row: dict[str, Any], earlier: tuple[tuple[int, Text], ...] = (), facts: tuple[str, ...] = ()) -> Sample:
    category = row.get("category")
    return Sample(
        prompt=text(row.get("prompt")),
        before=text(row.get("before")),
        after=text(row.get("after"), facts),
        category=None if category is None else str(category),
        earlier=earlier,
    )
