"""What was measured after training, as tables: verdicts, rates, merge; and what went in, the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval.report.run import Run
from eval.report.svg import interval_bar, short

Words = Callable[..., str]
METHODS = ("human", "judge", "reward_model", "rule:chrf")
RATES = ("refusal", "repetition", "missing_end", "empty", "mean_tokens")
COUNTED = ("rows_read", "pairs", "truncated_prompts", "truncated_completions", "truncated_conversations")


def percent(share: Any) -> str:
    """`57 %`."""
    return f"{100 * share:.1f} %" if _is_number(share) else "–"


def value(found: Any) -> str:
    """A value of a table."""
    if isinstance(found, bool):
        return "✓" if found else "✗"
    if _is_number(found):
        return short(found)
    if isinstance(found, list) and len(found) == 2 and all(map(_is_number, found)):
        return f"{short(found[0])} … {short(found[1])}"
    if isinstance(found, list) and all(isinstance(one, str) for one in found):
        return "; ".join(found) or "–"
    return "–" if found is None else str(found)


def verdict_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per method, the one that says most first, with rows of its categories; what a verdict lacks is left out."""
    verdicts = sorted(_objects(summary.get("verdicts")), key=lambda item: _weight(item[0]))
    return [
        _verdict(method, verdict)
        | {"categories": [_verdict(name, found) for name, found in _objects(verdict.get("by_category"))]}
        for method, verdict in verdicts
    ]


def _weight(method: str) -> int:
    """Its place among the methods: people before models before rules."""
    return next((place for place, name in enumerate(METHODS) if method.startswith(name)), len(METHODS))


def _verdict(name: str, verdict: Mapping[str, Any]) -> dict[str, Any]:
    low_high = verdict.get("interval") or ()
    rate = verdict.get("win_rate")
    has_bar = _is_pair(low_high) and _is_number(rate)
    difference = verdict.get("score_difference")
    return {
        "name": name,
        "counts": [verdict.get(key, "–") for key in ("win", "tie", "loss")],
        "rate": percent(rate),
        "interval": _span(low_high),
        "bar": interval_bar(*(min(1.0, max(0.0, one)) for one in (rate, *low_high))) if has_bar else "",
        "tone": _tone(low_high) if _is_pair(low_high) else "",
        "length_controlled": percent(verdict.get("length_controlled_win_rate")),
        "length_controlled_interval": _span(verdict.get("length_controlled_interval"))
        or verdict.get("length_controlled_why_unknown")
        or "",
        "difference": value(difference.get("mean")) if isinstance(difference, dict) else "–",
        "difference_interval": value(difference["interval"])
        if isinstance(difference, dict) and _is_pair(difference.get("interval"))
        else "",
    }


def _tone(interval: Any) -> str:
    """Whether the interval leaves no doubt which side wins."""
    return "ok" if interval[0] > 0.5 else "bad" if interval[1] < 0.5 else ""


def rate_rows(summary: Mapping[str, Any], words: Words) -> list[tuple[str, str, str]]:
    """(name, before, after) of what went wrong in the answers, and how long they are."""
    sides = dict(_objects(summary.get("rates")))
    before, after = sides.get("before", {}), sides.get("after", {})
    names = [name for name in RATES if name in before or name in after]
    names += [name for name in before if name not in RATES]
    shown: dict[str, Callable[[Any], str]] = {"mean_tokens": value}
    rows = []
    for name in names:
        form = shown.get(name, percent)
        label = words(f"rate_{name}") if name in RATES else name
        rows.append((label, form(before.get(name)), form(after.get(name))))
    for name, form in (("rewards", value), ("facts", percent)):
        found = summary.get(name)
        if isinstance(found, dict) and {"before", "after"} <= found.keys():
            rows.append((words(f"rate_{name}"), form(found["before"]), form(found["after"])))
    return rows


def other_facts(summary: Mapping[str, Any], words: Words) -> list[tuple[str, str]]:
    """Facts that were kept, held-out accuracy and margin, KL, time."""
    named = [
        ("held_out", "reward_accuracy"), ("held_out", "margin"), ("kl", "mean"), ("kl", "per_token"),
    ]  # fmt: skip
    facts = []
    kept = summary.get("facts")
    if isinstance(kept, dict) and {"still_right", "right_before"} <= kept.keys():
        counts = words("facts_kept_of", part=value(kept["still_right"]), whole=value(kept["right_before"]))
        facts.append((words("facts_kept"), _with_span(counts, _span(kept.get("kept_interval")))))
    for group, key in named:
        found = summary.get(group)
        if isinstance(found, dict) and found.get(key) is not None:
            span = value(found["interval"]) if key == "mean" and _is_pair(found.get("interval")) else ""
            facts.append((words(f"{group}_{key}"), _with_span(value(found[key]), span)))
    for key in ("prompts", "seconds"):
        if key in summary:
            facts.append((words(f"summary_{key}"), value(summary[key])))
    return facts


def tables_of(content: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Any report as facts and tables: lists and groups of objects become tables, all else is named values."""
    facts, tables = [], []
    for name, found in content.items():
        label = str(name).replace("_", " ")
        if isinstance(found, dict) and found and all(isinstance(one, dict) for one in found.values()):
            tables.append(_table(label, [{"": key} | one for key, one in found.items()]))
        elif isinstance(found, list) and found and all(isinstance(one, dict) for one in found):
            tables.append(_table(label, found))
        elif isinstance(found, dict):
            facts += [(f"{label}: {str(key).replace('_', ' ')}", value(one)) for key, one in found.items()]
        else:
            facts.append((label, value(found)))
    return facts, tables


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = dict.fromkeys(key for row in rows for key in row)
    columns = [column for column in known if any(row.get(column) not in (None, []) for row in rows)]
    return {
        "title": title,
        "columns": [str(column).replace("_", " ") for column in columns],
        "rows": [[value(row.get(column)) for column in columns] for row in rows],
    }


def data_of(run: Run, words: Words) -> dict[str, Any]:
    """The account of the data: by source where the run left one, else the lines of its card; and what lint found."""
    sources = [source for source in run.data.get("sources") or () if isinstance(source, dict)]
    lint = run.data.get("lint")
    lint = lint if isinstance(lint, dict) else {}
    rules = [
        {"name": name, "count": "–", "advice": "", "blocks": False} | rule for name, rule in _objects(lint.get("rules"))
    ]
    return {
        "sources": [_source(source, words) for source in sources],
        "lines": run.data.get("summary") or run.data_lines,
        "lint": rules,
        "has_lint": bool(lint),
        "train": run.data.get("train"),
        "held_out": run.data.get("held_out"),
    }


def _source(source: Mapping[str, Any], words: Words) -> dict[str, Any]:
    counts = [
        (words(f"data_{key}"), short(source[key])) for key in COUNTED if _is_number(source.get(key)) and source[key]
    ]
    return {
        "name": source.get("source", "–"),
        "format": source.get("dataset_format", ""),
        "counts": counts,
        "refused": _reasons(source.get("refused")),
        "repaired": _reasons(source.get("repaired")),
    }


def _reasons(found: Any) -> list[tuple[str, str]]:
    return [(str(reason), value(count)) for reason, count in found.items()] if isinstance(found, dict) else []


def _span(found: Any) -> str:
    """An interval of shares; nothing where there is none."""
    return f"{percent(found[0])} … {percent(found[1])}" if _is_pair(found) else ""


def _with_span(number: str, span: str) -> str:
    return f"{number} ({span})" if span else number


def _objects(found: Any) -> list[tuple[str, dict[str, Any]]]:
    items = found.items() if isinstance(found, dict) else ()
    return [(str(name), one) for name, one in items if isinstance(one, dict)]


def _is_number(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool)


def _is_pair(found: Any) -> bool:
    return isinstance(found, list | tuple) and len(found) == 2 and all(map(_is_number, found))
