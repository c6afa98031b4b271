"""What a comparison comes to: win rates with intervals, rates of what goes wrong, distance from the reference."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from eval.answers import Row, Verdict, Winner
from eval.rates import facts, rates
from eval.statistics import bootstrap_mean, length_controlled, mean
from qlora_dpo.reference.intervals import wilson
from qlora_dpo.training.folder.run_folder import CONFIG, METRICS
from qlora_dpo.training.records.tracking import read_metrics

_POINTS: dict[Winner, float] = {"after": 1.0, "tie": 0.5, "before": 0.0}
DEFAULT = "rule:chrf"
AT_EQUAL_LENGTH = "at equal length"
_NO_CATEGORY = "none"
_SHOWN_CATEGORIES = 20


def summarize(
    settings: Mapping[str, Any], rows: Sequence[Row], verdicts: Iterable[Verdict], adapter: Path
) -> dict[str, Any]:
    """The content of summary.json. Verdicts about other answers are left out; `adapter` is where its run is looked
    for."""
    known = {row.id: row for row in rows}
    by_method: dict[str, dict[str, list[Verdict]]] = defaultdict(lambda: defaultdict(list))
    for verdict in _latest(verdicts):
        if verdict.id in known:
            by_method[verdict.method][verdict.id].append(verdict)
    before, after = [row.before for row in rows], [row.after for row in rows]
    return {
        "settings": dict(settings),
        "prompts": len(rows),
        "verdicts": {
            method: _of_method([(known[id_], majority(found)) for id_, found in given.items()])
            for method, given in sorted(by_method.items())
        },
        "rates": {"before": rates(before), "after": rates(after)},
        "facts": facts(rows),
        "rewards": {"before": mean([one.reward for one in before]), "after": mean([one.reward for one in after])},
        "held_out": held_out(adapter),
        "kl": divergence(rows),
        "seconds": sum(answer.seconds for answer in (*before, *after)),
    }


def majority(verdicts: Sequence[Verdict]) -> Verdict:
    """What more than half of the annotators say; a tie where no such half is."""
    (winner, count), *_ = Counter(verdict.winner for verdict in verdicts).most_common(1)
    if len(verdicts) == 1:
        return verdicts[0]
    first = verdicts[0]
    return Verdict(first.id, first.method, winner if 2 * count > len(verdicts) else "tie", None)


def divergence(rows: Sequence[Row]) -> dict[str, Any] | None:
    """KL(policy || reference) of whole answers, in nats: the mean log-ratio of what the policy drew at temperature 1;
    None where nothing was drawn."""
    samples = [row.sample for row in rows if row.sample is not None]
    if not samples:
        return None
    ratios = [sample.logp_policy - sample.logp_reference for sample in samples]
    tokens = sum(sample.tokens for sample in samples)
    return {
        "mean": mean(ratios),
        "interval": bootstrap_mean(ratios),
        "per_token": sum(ratios) / tokens,
        "samples": len(samples),
    }


def held_out(adapter: Path) -> dict[str, Any] | None:
    """Reward accuracy and margin that the run measured on held-out pairs, at the checkpoint's step or at the end; None
    where it did not."""
    run = next((folder for folder in (adapter, adapter.absolute().parent) if (folder / CONFIG).is_file()), None)
    if run is None:
        return None
    step = re.fullmatch(r"checkpoint-(\d+)", adapter.absolute().name) if run != adapter else None
    measured = [
        row
        for row in read_metrics(run / METRICS)
        if "eval_rewards/accuracies" in row and (step is None or row["step"] <= int(step[1]))
    ]
    if not measured:
        return None
    last = measured[-1]
    return {
        "reward_accuracy": last["eval_rewards/accuracies"],
        "margin": last.get("eval_rewards/margins"),
        "step": last["step"],
    }


def table(summary: Mapping[str, Any]) -> list[str]:
    """The summary as lines to print."""
    found = summary["verdicts"]
    lines = ["", f"Before and after, {summary['prompts']:,} prompts ({summary['settings']['adapter']}):", ""]
    if found:
        lines += _lines_of({name: found[name] for name in sorted(found, key=lambda name: name != DEFAULT)})
        by_category = found.get(DEFAULT, next(iter(found.values())))["by_category"]
        if len(by_category) > 1:
            lines += ["", *_lines_of(dict(islice(by_category.items(), _SHOWN_CATEGORIES)), "category")]
    else:
        lines += ["No verdicts: no prompt has a reference answer, and neither a --reward_model nor a judge is named."]
    lines += ["", f"{'':22}{'before':>9}{'after':>9}"]
    for name, value in summary["rates"]["before"].items():
        lines.append(_pair_line(name.replace("_", " "), value, summary["rates"]["after"][name]))
    lines.append(_pair_line("implicit reward", *summary["rewards"].values()))
    if of := summary["facts"]:
        lines.append(_pair_line("facts stated", of["before"], of["after"]))
        lines.append(f"{'facts kept':22}{of['still_right']:>9} of {of['right_before']}")
    if of := summary["kl"]:
        per_token = f"{of['per_token']:.3f} per token"
        lines.append(
            f"{'KL to the reference':22}{of['mean']:>9.2f} nats per answer{_span(of['interval'])}, {per_token}"
        )
    if of := summary["held_out"]:
        lines.append(
            f"{'held-out accuracy':22}{of['reward_accuracy']:>9.3f} of the run's pairs, at its step {of['step']}"
        )
    return lines


def _of_method(judged: Sequence[tuple[Row, Verdict]]) -> dict[str, Any]:
    """All numbers of one method, together and by category."""
    by_category: dict[str, list[tuple[Row, Verdict]]] = defaultdict(list)
    for row, verdict in judged:
        by_category[row.category or _NO_CATEGORY].append((row, verdict))
    controlled = length_controlled(
        [_POINTS[verdict.winner] for _, verdict in judged], [row.after.tokens - row.before.tokens for row, _ in judged]
    )
    return _counts(judged) | {
        "length_controlled_win_rate": controlled.win_rate,
        "length_controlled_interval": controlled.interval,
        "length_controlled_why_unknown": controlled.why_unknown,
        "by_category": {name: _counts(found) for name, found in sorted(by_category.items())},
    }


def _counts(judged: Sequence[tuple[Row, Verdict]]) -> dict[str, Any]:
    counts = Counter(verdict.winner for _, verdict in judged)
    won = counts["after"] + counts["tie"] / 2
    differences = [verdict.scores[1] - verdict.scores[0] for _, verdict in judged if verdict.scores]
    return {
        "prompts": len(judged),
        "win": counts["after"],
        "tie": counts["tie"],
        "loss": counts["before"],
        "win_rate": won / len(judged),
        "interval": wilson(won, len(judged)),
        "score_difference": {"mean": mean(differences), "interval": bootstrap_mean(differences)}
        if differences
        else None,
    }


def _latest(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The last of each id, method and annotator."""
    return list({(found.id, found.method, found.annotator): found for found in verdicts}.values())


def _lines_of(found: Mapping[str, Mapping[str, Any]], head: str = "method") -> list[str]:
    """A line for each method, or category of one, with its counts, win rate and mean difference of scores."""
    width = max(len(name) for name in (head, *found))
    is_method = head == "method"
    columns = ("win rate (95 %)", *((AT_EQUAL_LENGTH,) if is_method else ()))
    lines = [f"{head:{width}}   win  tie loss  {''.join(f'{name:24}' for name in columns)}score difference"]
    for name, of in found.items():
        parts = [f"{of['win']:5} {of['tie']:4} {of['loss']:4}", f"{of['win_rate']:.3f}{_span(of['interval'])}"]
        if is_method:
            rate, span = of["length_controlled_win_rate"], of["length_controlled_interval"]
            parts.append(f"{'not known' if rate is None else f'{rate:.3f}{_span(span)}':22}")
        difference = of["score_difference"]
        parts.append(f"{difference['mean']:+.3f}{_span(difference['interval'])}" if difference else "")
        lines.append(f"{name:{width}} {'  '.join(parts)}".rstrip())
    unknown = {of["length_controlled_why_unknown"] for of in found.values() if of.get("length_controlled_why_unknown")}
    return lines + [f"{AT_EQUAL_LENGTH} not known: {reason}" for reason in sorted(unknown)]


def _pair_line(name: str, before: float, after: float) -> str:
    return f"{name:22}{_short(before):>9}{_short(after):>9}"


def _span(interval: Sequence[float]) -> str:
    return f" ({interval[0]:.3f} to {interval[1]:.3f})"


def _short(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
