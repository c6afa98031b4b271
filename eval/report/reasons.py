"""Answers "why is my chosen reward negative?" with the numbers of a run.

What DPO raises is the difference of two log-probs, so there are three places where the chosen answers' can end: above
the reference's, below it but above the rejected answers' (displacement), or below those too (then something is broken).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

from eval.report.curves import LIMIT, PER_TOKEN
from eval.report.svg import short

STILL = 0.05  # nats per answer: less is noise
LAST = 20  # training steps that are averaged where no pairs were held out

Case = Literal[
    "apart", "both_up", "slight", "deep", "unmeasured", "reversed", "behind", "memorized", "still", "unknown"
]
_KEYS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", PER_TOKEN[0])
_SETTING = re.compile(r"\[\[(\w+)\]\]")


@dataclass(frozen=True)
class Shift:
    """Where the log-probs of the answers went against the reference, which is also where they started."""

    chosen_reward: float
    rejected_reward: float
    accuracy: float | None
    chosen_per_token: float | None
    """Nats; None where the run did not log it."""
    beta: float
    is_held_out: bool
    """Measured on held-out pairs; else the mean of the last training steps."""
    training_margin: float

    @property
    def chosen(self) -> float:
        """Nats per answer."""
        return self.chosen_reward / self.beta

    @property
    def rejected(self) -> float:
        """Nats per answer."""
        return self.rejected_reward / self.beta

    @property
    def margin(self) -> float:
        """Of the rewards."""
        return self.chosen_reward - self.rejected_reward

    @property
    def share(self) -> float:
        """How much of the larger of two movements in the same direction is common to both answers, from 0 to 1."""
        if self.chosen * self.rejected <= 0:
            return 0.0
        return min(abs(self.chosen), abs(self.rejected)) / max(abs(self.chosen), abs(self.rejected))

    @property
    def case(self) -> Case:
        """Which of the stories this run tells."""
        if not all(map(math.isfinite, (self.chosen, self.rejected))):
            return "unknown"
        if max(abs(self.chosen), abs(self.rejected)) < STILL:
            return "still"
        if self.margin <= 0 and self.is_held_out and self.training_margin > 0:
            return "memorized"
        if self.margin <= 0:
            return "reversed" if self.chosen < 0 < self.rejected else "behind"
        if self.chosen >= 0:
            return "both_up" if self.rejected > 0 else "apart"
        if self.chosen_per_token is None:
            return "unmeasured"
        return "deep" if self.chosen_per_token <= LIMIT else "slight"


def shift_of(metrics: Sequence[Mapping[str, Any]], beta: float) -> Shift | None:
    """What the last evaluation says, else the last training steps; None where neither has rewards."""
    training = _means(metrics[-LAST:], "")
    evaluated = next((row for row in reversed(metrics) if "eval_rewards/chosen" in row), None)
    values = training if evaluated is None else _means([evaluated], "eval_")
    if "rewards/chosen" not in values or "rewards/rejected" not in values or not beta:
        return None
    margin = training.get("rewards/chosen", 0.0) - training.get("rewards/rejected", 0.0)
    return Shift(
        chosen_reward=values["rewards/chosen"],
        rejected_reward=values["rewards/rejected"],
        accuracy=values.get("rewards/accuracies"),
        chosen_per_token=values.get(PER_TOKEN[0]),
        beta=beta,
        is_held_out=evaluated is not None,
        training_margin=margin,
    )


def _means(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Of what is finite; a metric that never was is nan."""
    means = {}
    for key in _KEYS:
        values = [row[prefix + key] for row in rows if isinstance(row.get(prefix + key), int | float)]
        finite = [value for value in values if math.isfinite(value)]
        if values:
            means[key] = sum(finite) / len(finite) if finite else math.nan
    return means


def reasons(shift: Shift, config: Mapping[str, Any], words: Callable[..., str]) -> dict[str, Any]:
    """The paragraph: what happened in one sentence, the numbers, what it means, what to change.

    Settings that are named link to the page's table of settings and show their value.
    """
    case = shift.case
    numbers = _numbers(shift, words)
    advice = "advice_deep_sft" if case == "deep" and "sft" in (config.get("loss_type") or ()) else f"advice_{case}"
    counted = "" if case in {"unknown", "still"} else words(f"numbers_{_direction(shift)}", **numbers)
    return {
        "case": case,
        "is_negative": shift.chosen_reward < 0,
        "tone": {"deep": "warn", "reversed": "bad", "behind": "bad", "memorized": "bad", "unknown": "bad"}.get(
            case, "ok"
        ),
        "verdict": words(f"verdict_{case}", **numbers),
        "numbers": counted,
        "meaning": words(f"reason_{case}", **numbers),
        "advice": with_settings(words(advice, **numbers), config),
        "bars": bars(shift, words),
    }


def _direction(shift: Shift) -> str:
    if shift.chosen < 0 and shift.rejected < 0:
        return "down"
    return "up" if shift.chosen > 0 and shift.rejected > 0 else "apart"


def _numbers(shift: Shift, words: Callable[..., str]) -> dict[str, str]:
    """Every number that a sentence may name."""
    per_token = shift.chosen_per_token
    known = per_token is not None and math.isfinite(per_token)
    return {
        "pairs": words("on_held_out" if shift.is_held_out else "on_training", count=LAST),
        "chosen_reward": short(shift.chosen_reward),
        "rejected_reward": short(shift.rejected_reward),
        "margin": short(shift.margin),
        "training_margin": short(shift.training_margin),
        "chosen": short(abs(shift.chosen)),
        "rejected": short(abs(shift.rejected)),
        "chosen_factor": _factor(shift.chosen),
        "rejected_factor": _factor(shift.rejected),
        "per_token": words("per_token", value=short(per_token)) if known and per_token is not None else "",
        "share": _percent(shift.share),
        "rest": _percent(1 - shift.share),
        "accuracy": "" if shift.accuracy is None else words("with_accuracy", value=_percent(shift.accuracy)),
        "limit": short(LIMIT),
        "beta": f"{shift.beta:g}",
    }


def _percent(share: float) -> str:
    """`57 %`."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else "–"


def _factor(nats: float) -> str:
    """exp(nats), as far as one can imagine it."""
    size = abs(nats)
    return f"{math.exp(size):,.3g}" if size < 7 else f"10^{size / math.log(10):,.0f}"


def with_settings(text: str, config: Mapping[str, Any]) -> Markup:
    """The text, escaped, with a link and the run's value for each `[[setting]]`."""
    parts = []
    for place, part in enumerate(_SETTING.split(text)):
        if place % 2 == 0:
            parts.append(escape(part))
        else:
            value = f" ({setting(config[part])})" if part in config else ""
            parts.append(Markup('<a href="#setting-{0}"><code>--{0}</code></a>{1}').format(part, value))
    return Markup("").join(parts)


def setting(value: Any) -> str:
    """The value of an option as one would give it."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    if isinstance(value, bool):
        return str(value).lower()
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def bars(shift: Shift, words: Callable[..., str]) -> Markup:
    """Where both kinds of answers went, as two bars from zero; what is common to both is paler."""
    if not all(map(math.isfinite, (shift.chosen, shift.rejected))):
        return Markup("")
    most = max(abs(shift.chosen), abs(shift.rejected), STILL)
    middle, reach = 150, 105
    common = min(abs(shift.chosen), abs(shift.rejected)) if shift.share else 0.0
    parts = []
    for top, name, moved, color in ((20, "chosen", shift.chosen, 1), (76, "rejected", shift.rejected, 2)):
        sign = -1 if moved < 0 else 1
        own = [(0.0, common, " common"), (common, abs(moved), "")]
        for begin, end, kind in own:
            ends = sorted((middle + sign * reach * begin / most, middle + sign * reach * end / most))
            parts.append(
                f'<rect class="c{color}{kind}" x="{ends[0]:.1f}" width="{ends[1] - ends[0]:.1f}" y="{top}" '
                'height="20"/>'
            )
        # On the side of zero where the bar is not, there is room for its name and number.
        place, anchor = (middle + 10, "start") if sign < 0 else (middle - 10, "end")
        parts.append(f'<text x="{place}" y="{top + 8}" text-anchor="{anchor}">{escape(words(name))}</text>')
        number = f'<text class="number" x="{place}" y="{top + 24}" text-anchor="{anchor}">{short(moved)}</text>'
        parts.append(number)
    note = words("own") + (f" · {words('common')}: {short(common)}" if common else "")
    parts.append(f'<text x="150" y="128" text-anchor="middle">{escape(note)}</text>')
    parts.append(f'<line class="zero" x1="{middle}" x2="{middle}" y1="8" y2="108"/>')
    return Markup(f'<svg class="shift" viewBox="0 0 300 136" aria-hidden="true">{"".join(parts)}</svg>')
