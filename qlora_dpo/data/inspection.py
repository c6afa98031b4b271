"""What is in a file of pairs: lengths, turns, languages, categories, repetitions, and what training on it will take."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.data.languages import UNKNOWN, language_of
from qlora_dpo.data.linting.sets import length_bias
from qlora_dpo.data.preferences import PreferencePair
from qlora_dpo.data.report import DataReport, not_read

SAMPLED_LANGUAGES = 1000
PARTS = ("prompt", "chosen", "rejected")
BINS = 40
_QUANTILES = {"median": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}

Lengths = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(slots=True)
class TextCounts:
    """What one reading of the texts counts."""

    turns: Counter[int] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    other_language: int = 0
    """Sampled pairs whose chosen answer is in another language than the question."""
    with_system: int = 0
    systems: set[str] = field(default_factory=set)
    duplicates: int = 0
    prompts: set[bytes] = field(default_factory=set)
    lengths: list[tuple[int, int, int]] = field(default_factory=list)
    """In characters."""


def count_texts(pairs: Iterable[PreferencePair]) -> TextCounts:
    """Read all pairs once; the languages are those of a seeded sample."""
    counts = TextCounts()
    seen: set[bytes] = set()
    sample: list[tuple[str, str]] = []
    draw = random.Random(0)
    for number, pair in enumerate(pairs):
        messages = pair.messages
        systems = [message["content"] for message in messages if message["role"] == "system"]
        counts.turns[len(messages) - len(systems) + 1] += 1
        counts.with_system += bool(systems)
        counts.systems.update(systems)
        counts.categories[pair.category or ""] += 1
        prompt = "".join(f"\0{message['role']}\0{message['content']}" for message in messages)
        counts.lengths.append((sum(len(turn["content"]) for turn in messages), len(pair.chosen), len(pair.rejected)))
        counts.prompts.add(_digest(prompt))
        key = _digest(f"{prompt}\0\0{pair.chosen}\0\0{pair.rejected}")
        counts.duplicates += key in seen
        seen.add(key)
        place = number if number < SAMPLED_LANGUAGES else draw.randint(0, number)
        if place < SAMPLED_LANGUAGES:
            sample[place : place + 1] = [(messages[-1]["content"], pair.chosen)]
    for question, answer in sample:
        asked, answered = language_of(question), language_of(answer)
        counts.languages[answered] += 1
        counts.other_language += asked != answered and UNKNOWN not in (asked, answered)
    return counts


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def inspection(report: DataReport, counts: TextCounts, dataset: PairDataset | None) -> dict[str, Any]:
    """Everything that was found, in plain values; without a data set of token ids lengths are in characters."""
    lengths = dataset.lengths() if dataset else _columns(counts.lengths)
    share, correlation = length_bias(lengths[1], lengths[2])
    return {
        "source": report.source,
        "dataset_format": report.dataset_format,
        "rows": report.rows_read,
        "pairs": report.pairs,
        "refused": _by_reason(report, left_out=False),
        "left_out": _by_reason(report, left_out=True),
        "repaired": dict(report.repaired),
        "unread_columns": list(report.unread_columns),
        "unit": "tokens" if dataset else "characters",
        "lengths": {part: _quantiles(column) for part, column in zip(PARTS, lengths, strict=True)},
        "histogram": _histogram(lengths),
        "length_bias": {"chosen_is_longer": round(share, 4), "correlation": round(correlation, 4)},
        "turns": {str(turns): count for turns, count in sorted(counts.turns.items())},
        "system_prompts": {"pairs": counts.with_system, "different": len(counts.systems)},
        "languages": {
            "sampled": sum(counts.languages.values()),
            "answers": dict(counts.languages.most_common()),
            "answered_in_another": counts.other_language,
        },
        "duplicates": {"pairs": counts.duplicates, "different_prompts": len(counts.prompts)},
        "categories": dict(counts.categories.most_common()) if set(counts.categories) != {""} else {},
        **(_of_tokens(report, lengths) if dataset else {}),
    }


def _by_reason(report: DataReport, *, left_out: bool) -> dict[str, int]:
    return dict(Counter(row.kind for row in report.refused if row.left_out == left_out).most_common())


def _of_tokens(report: DataReport, lengths: Lengths) -> dict[str, Any]:
    from qlora_dpo.data.packing import token_cost

    columns = zip(*(column.tolist() for column in lengths), strict=True)
    shared = sum(token_cost(_Lengths(*map(range, row)), "shared") for row in columns)
    apart = shared + int(lengths[0].sum())
    return {
        "cut": {
            "prompts": report.truncated_prompts,
            "answers": report.truncated_completions,
            "equal_after_cut": report.dropped_equal_after_truncation,
        },
        "sharing": {"tokens": shared, "without": apart, "saved": round(1 - shared / apart, 4)},
    }


@dataclass(frozen=True, slots=True)
class _Lengths:
    """As much of a pair as its cost depends on."""

    prompt_ids: range
    chosen_ids: range
    rejected_ids: range


def _columns(rows: list[tuple[int, int, int]]) -> Lengths:
    columns = np.array(rows, np.int64).reshape(-1, 3)
    return columns[:, 0], columns[:, 1], columns[:, 2]


def _quantiles(column: NDArray[np.int64]) -> dict[str, float]:
    quantiles = {name: float(np.quantile(column, share)) for name, share in _QUANTILES.items()}
    return {"mean": round(float(column.mean()), 1), **quantiles}


def _histogram(lengths: Lengths) -> dict[str, list[float]]:
    """Counts of each part between common edges; the last bin takes the longest 0.5 percent too."""
    longest = max(float(np.quantile(column, 0.995)) for column in lengths)
    edges = np.linspace(0, max(longest, 1.0), BINS + 1)
    counts = {
        part: np.histogram(np.minimum(column, edges[-1]), edges)[0].tolist()
        for part, column in zip(PARTS, lengths, strict=True)
    }
    return {"edges": np.round(edges, 2).tolist(), **counts}


def table(found: Mapping[str, Any]) -> list[str]:
    """The inspection as lines for a terminal."""
    lines = [f"{found['source']}: {found['pairs']:,} pairs from {found['rows']:,} rows ({found['dataset_format']})"]
    for name, rows in (("refused", found["refused"]), ("left out", found["left_out"])):
        lines += [f"{name}: {sum(rows.values()):,} rows"] * bool(rows)
        lines += [f"  {count:,} x {reason}" for reason, count in rows.items()]
    lines += [f"repaired: {count:,} x {kind}" for kind, count in found["repaired"].items()]
    lines += not_read(found["unread_columns"])
    lines += ["", f"  {found['unit']:10}" + "".join(f"{name:>9}" for name in ("mean", *_QUANTILES))]
    for part in PARTS:
        values = "".join(f"{value:9,.0f}" for value in found["lengths"][part].values())
        lines.append(f"  {part:10}{values}  {_sparkline(found['histogram'][part])}")
    lines += [f"  (bars: 0 to {found['histogram']['edges'][-1]:,.0f} {found['unit']}, the longest in the last)", ""]
    return [*lines, *_facts(found)]


def _facts(found: Mapping[str, Any]) -> list[str]:
    pairs, bias, languages = found["pairs"], found["length_bias"], found["languages"]
    turns = _shares(found["turns"], pairs)
    rows = [
        ("chosen is longer", f"{bias['chosen_is_longer']:.0%} of the pairs; correlation {bias['correlation']:+.2f}"),
        ("turns with answer", turns),
        ("system prompts", "{pairs:,} pairs, {different:,} different".format(**found["system_prompts"])),
        ("languages", f"{_shares(languages['answers'], languages['sampled'])} (of {languages['sampled']:,} answers)"),
        ("answered in another", f"{languages['answered_in_another']:,} of {languages['sampled']:,} sampled pairs"),
        ("exact duplicates", f"{found['duplicates']['pairs']:,} pairs"),
        ("different prompts", f"{found['duplicates']['different_prompts']:,}"),
        ("categories", _shares({name or "none": n for name, n in found["categories"].items()}, pairs) or "none"),
    ]
    if "cut" in found:
        cut, sharing = found["cut"], found["sharing"]
        rows += [
            ("cut prompts", f"{cut['prompts']:,} ({cut['prompts'] / pairs:.1%}), the end is kept"),
            ("cut answers", f"{cut['answers']:,} ({cut['answers'] / (2 * pairs):.1%}), the end token is lost"),
            ("equal after the cut", f"{cut['equal_after_cut']:,} pairs left out"),
            ("tokens", "{tokens:,}; without shared prompts {without:,} ({saved:.0%} saved)".format(**sharing)),
        ]
    if "training" in found:
        training = found["training"]
        rows.append(("optimizer steps", "{steps:,} of {pairs_per_step} pairs (epochs: {epochs:g})".format(**training)))
        if training.get("hours") is not None:
            rows.append(("time", "{hours:,.2f} hours at {tokens_per_second:,.0f} tokens per second".format(**training)))
    return [f"  {name:20} {value}" for name, value in rows]


def _shares(counts: Mapping[str, int], total: int, shown: int = 8) -> str:
    """The largest counts with their shares."""
    most = sorted(counts.items(), key=lambda item: -item[1])
    parts = [f"{name}: {count:,} ({count / max(1, total):.0%})" for name, count in most[:shown]]
    return ", ".join(parts) + (f", {len(most) - shown} more" if len(most) > shown else "")


def _sparkline(counts: list[int]) -> str:
    bars = " ▁▂▃▄▅▆▇█"
    highest = max(counts, default=0) or 1
    return "".join(bars[-(-8 * count // highest)] for count in counts)
