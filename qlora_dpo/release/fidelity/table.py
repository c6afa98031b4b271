"""The measured candidates of a merge: which is the best, and all of them as a table in plain words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from qlora_dpo.release.fidelity.distributions import Compared
from qlora_dpo.release.fidelity.measuring import LEAST_MARGIN_KEPT, MOST_KL, Fidelity
from qlora_dpo.release.fidelity.yardstick import Yardstick
from qlora_dpo.release.merging.weights import LayerUpdate

WIDTH = 80
AGAIN, BASE = "the adapter again", "without the adapter"
COLUMNS = (
    ("KL per", "token", "mean"), ("", "", "p99"), ("of what", "training", "changed"), ("same", "first", "token"),
    ("log-prob", "off by", "at most"), ("", "margin", "kept"), ("", "pairs", "right"),
)  # fmt: skip
_WIDTHS = (20, 9, 9, 9, 8, 9, 8, 8)
UPDATE_COLUMNS = (("update", "of a layer"), ("storage", "keeps"), ("at", "worst"), ("numbers left", "as they were"))
_UPDATE_WIDTHS = (20, 12, 12, 12, 15)
WELL_KEPT = 0.95


@dataclass(frozen=True)
class Measured:
    """A candidate that was written and measured."""

    name: str
    fidelity: Fidelity
    updates: Sequence[LayerUpdate]
    size: int
    """Bytes."""


def best(measured: Sequence[Measured], force: bool = False) -> Measured | None:
    """The candidate nearest to the trained adapter among those that are not refused, or with `force` among all.

    What is less than a percent of what training changed decides nothing: then the one that is named first is taken.
    """
    usable = [one for one in measured if force or not one.fidelity.is_refused]
    return min(usable, key=_distance, default=None)


def _distance(one: Measured) -> tuple[bool, float]:
    found = one.fidelity
    if found.kl_mean is None:
        return found.is_refused, math.inf
    return found.is_refused, found.kl_mean if found.kl_of_scale is None else math.floor(100 * found.kl_of_scale)


def update_summary(updates: Sequence[LayerUpdate]) -> dict[str, Any]:
    """The layers whose update is not 0 in a few numbers: medians, and where storage keeps least."""
    updates = [update for update in updates if update.size]
    if not updates:
        return {}
    worst = min(updates, key=lambda update: update.kept)
    return {
        "update_size": median(update.size for update in updates),
        "update_kept": median(update.kept for update in updates),
        "update_lost": median(update.lost for update in updates),
        "update_kept_worst": worst.kept,
        "update_kept_worst_layer": worst.name,
    }


def table(yardstick: Yardstick, measured: Sequence[Measured], chosen: str | None) -> str:
    """The table as a terminal shows it, with what every number means."""
    heads = [_line("", row) for row in zip(*COLUMNS, strict=True)]
    scales = [_line(name, cells) for name, cells in _scales(yardstick)]
    names = [f"{one.name} *" if one.name == chosen else one.name for one in measured]
    rows = [_line(name, _cells(one.fidelity)) for name, one in zip(names, measured, strict=True)]
    lines = [*_wrapped(f"{_measured_on(yardstick)}:"), "", *heads, "-" * WIDTH, *scales, "-" * WIDTH, *rows, ""]
    if any(one.updates for one in measured):
        heads = [_line("", row, _UPDATE_WIDTHS) for row in zip(*UPDATE_COLUMNS, strict=True)]
        rows = [_line(name, _of_update(one), _UPDATE_WIDTHS) for name, one in zip(names, measured, strict=True)]
        lines += [*heads, "-" * sum(_UPDATE_WIDTHS), *rows, ""]
    for words in _words(yardstick, measured, chosen):
        lines += _wrapped(words)
    return "\n".join(lines)


def _measured_on(yardstick: Yardstick) -> str:
    facts = yardstick.facts()
    kind = f"{facts['pairs']:,} pairs" if facts["pairs"] else "conversations"
    return (
        f"How near each merged model is to the adapter on its base as it was trained, on {kind} ({facts['source']}) "
        f"and {facts['own_answers']:,} answers of the adapter, {facts['tokens']:,} tokens"
    )


def _scales(yardstick: Yardstick) -> list[tuple[str, list[str]]]:
    """The rows that the others are read by: rounding alone, and nothing kept."""
    return [(AGAIN, _compared(yardstick, yardstick.again)), (BASE, _compared(yardstick, yardstick.reference))]


def _compared(yardstick: Yardstick, compared: Compared) -> list[str]:
    count = len(compared.logps)
    trained = yardstick.margins
    margins = yardstick.margins_of(compared.logps)
    before = trained[: len(margins)]
    tells = yardstick.tells_margin and before.any()
    return [
        _number(compared.kl_mean),
        _number(compared.kl_p99),
        _percent(compared.kl_mean / yardstick.scale if yardstick.tells_kl else None),
        _percent(float((compared.tops == yardstick.recorded.tops[:count]).mean())),
        _number(float(np.abs(compared.logps - yardstick.recorded.logps[:count]).max())),
        _percent(float(margins.mean() / before.mean()) if tells else None),
        _percent(float((margins > 0).mean()) if margins.any() else None),
    ]


def _cells(fidelity: Fidelity) -> list[str]:
    return [
        _number(fidelity.kl_mean),
        _number(fidelity.kl_p99),
        _percent(fidelity.kl_of_scale),
        _percent(fidelity.top1_agreement),
        _number(fidelity.max_logp_difference),
        _percent(fidelity.margin_retained),
        _percent(fidelity.reward_accuracy),
    ]


def _words(yardstick: Yardstick, measured: Sequence[Measured], chosen: str | None) -> Iterator[str]:
    """The sentences below the table."""
    for one in measured:
        yield from (f"{one.name}: refused, {problem}." for problem in one.fidelity.problems)
        yield from (f"{one.name}: {warning}." for warning in one.fidelity.warnings)
    for one in measured:
        found = update_summary(one.updates)
        if found and found["update_kept_worst"] < WELL_KEPT:
            worst = f"{_percent(found['update_kept_worst'])} in {found['update_kept_worst_layer']}"
            yield f"{one.name}: storage rounds away a part of the update, at worst it keeps {worst}."
    yield from yardstick.notes()
    if any(one.name == chosen and not one.fidelity.is_refused for one in measured) and not yardstick.tells_kl:
        yield "* is taken: the smallest KL of those not refused, which rounding decides here."
    elif any(one.name == chosen and not one.fidelity.is_refused for one in measured):
        yield "* is taken: of those not refused, none is nearer by a percent of what training changed."
    yield (
        f"KL is how far predictions are apart, over the whole vocabulary. Refused: a KL above {100 * MOST_KL:.0f} % of "
        f"what training changed, or less than {100 * LEAST_MARGIN_KEPT:.0f} % of the margin kept. “{AGAIN}” is "
        "rounding alone."
    )


def _of_update(one: Measured) -> list[str]:
    found = update_summary(one.updates)
    names = ("update_size", "update_kept", "update_kept_worst", "update_lost")
    return [_percent(found.get(name)) for name in names]


def _line(name: str, cells: Sequence[str], widths: Sequence[int] = _WIDTHS) -> str:
    first, *others = widths
    return name.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, others, strict=True))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _number(found: float | None) -> str:
    return "–" if found is None else f"{found:.2g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
