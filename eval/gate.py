"""`gate`: a list of rules about the numbers of a comparison, and whether all of them hold.

A rule compares a metric with a number, or with another metric and what may be added to it:

    - {metric: verdicts.rule:chrf.interval.0, above: 0.5}
    - {metric: rates.after.repetition, at_most: rates.before.repetition, plus: 0.01}

A metric is the path of a number in summary.json. One that is not known (null) holds no rule.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.answers import FOLDER, SUMMARY, read_summary
from eval.options import GateOptions
from qlora_dpo.config.checks import nearest
from qlora_dpo.errors import DataError, QloraDpoError, StorageError
from qlora_dpo.files.guard import check_output, json_with
from qlora_dpo.training.folder.run_folder import write_atomically

RECORD = "gate.json"
DEFAULT_RULES = Path(__file__).parent / "rules" / "default.yaml"

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
}
_KEYS = ("metric", *COMPARISONS, "plus", "why")
_EXAMPLE = "- {metric: verdicts.rule:chrf.interval.0, above: 0.5}"


class NotGoodEnough(QloraDpoError):
    """A rule does not hold."""

    exit_code = 1


@dataclass(frozen=True)
class Rule:
    """One entry of a rules file."""

    metric: str
    comparison: str
    limit: float | str
    """A number, or the metric that has it."""
    plus: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """A rule with the numbers of a comparison."""

    rule: Rule
    value: float | None
    limit: float | None
    """With what may be added."""

    @property
    def holds(self) -> bool:
        """Both numbers are known, and compare as they should."""
        if self.value is None or self.limit is None:
            return False
        return COMPARISONS[self.rule.comparison](self.value, self.limit)


def gate(options: GateOptions) -> None:
    """The `gate` command: print which rules hold.

    Raises:
        NotGoodEnough: one does not.
        UsageError: gate.json beside the summary is something else.
        DataError: a rule cannot be understood.
        StorageError: rules or summary cannot be read: the comparison has not finished.
    """
    folder = folder_of(options.result)
    check_output(folder / RECORD, is_own=json_with("rules", "holds", "outcomes"), option=None)
    file = options.rules or DEFAULT_RULES
    outcomes = judge(read_rules(file), read_summary(folder), file)
    print("\n".join(table(outcomes)))
    record(folder, file, outcomes)
    failed = [outcome for outcome in outcomes if not outcome.holds]
    if failed:
        raise NotGoodEnough(
            f"{len(failed)} of {len(outcomes)} rules of {file} do not hold for {folder}: "
            f"{', '.join(outcome.rule.metric for outcome in failed)}."
        )
    print(f"All {len(outcomes)} rules of {file} hold for {folder}.")


def record(folder: Path, rules: Path, outcomes: Sequence[Outcome]) -> None:
    """Write gate.json beside the summary, for the model's card; a folder that takes no file stops nothing here."""
    content = {
        "rules": rules.name,
        "summary": hashlib.sha256((folder / SUMMARY).read_bytes()).hexdigest(),
        "holds": all(outcome.holds for outcome in outcomes),
        "outcomes": [
            {
                "metric": outcome.rule.metric,
                "comparison": outcome.rule.comparison,
                "value": outcome.value,
                "limit": outcome.limit,
                "holds": outcome.holds,
            }
            for outcome in outcomes
        ],
    }
    with suppress(OSError):
        write_atomically(folder / RECORD, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def folder_of(result: Path) -> Path:
    """The folder of the comparison that a run, the folder itself, or its summary stands for."""
    if result.name == SUMMARY:
        return result.parent
    own = (result / SUMMARY).is_file() or not (result / FOLDER).is_dir()
    return result if own else result / FOLDER


def read_rules(file: Path) -> list[Rule]:
    """The rules of a YAML file.

    Raises:
        StorageError: it cannot be read.
        DataError: it holds something else.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"--rules {file} cannot be read: {error.strerror or error}; check the path.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"--rules {file} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, list) or not content:
        raise DataError(f"--rules {file} must be a list of rules, such as `{_EXAMPLE}`.")
    return [_rule(entry, f"{file}: rule {number}") for number, entry in enumerate(content, 1)]


def judge(rules: Sequence[Rule], summary: dict[str, Any], file: Path) -> list[Outcome]:
    """Each rule with the numbers of a summary.

    Raises:
        DataError: a rule names no metric of it; says which is nearest.
    """
    metrics = dict(_flat(summary))

    def value_of(metric: str, number: int) -> float | None:
        if metric not in metrics:
            unknown = [name for name in metrics if metrics[name] is None and metric.startswith(f"{name}.")]
            if unknown:
                return None
            raise DataError(
                f"{file}: rule {number}: {metric!r} is no metric of this comparison{nearest(metric, metrics)}."
            )
        return metrics[metric]

    outcomes = []
    for number, rule in enumerate(rules, 1):
        limit = value_of(rule.limit, number) if isinstance(rule.limit, str) else rule.limit
        outcomes.append(Outcome(rule, value_of(rule.metric, number), None if limit is None else limit + rule.plus))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """A line for each rule: whether it holds, the metric with its value, and what was asked of it."""
    width = max(len(outcome.rule.metric) for outcome in outcomes)
    lines = [f"{'':5}{'metric':{width}}  {'value':>9}  rule"]
    for outcome in outcomes:
        rule = outcome.rule
        asked = f"{rule.comparison.replace('_', ' ')} {_number(outcome.limit)}"
        if isinstance(rule.limit, str):
            asked += f" ({rule.limit}{f' + {rule.plus:g}' if rule.plus else ''})"
        why = f"  # {rule.why}" if rule.why else ""
        lines.append(
            f"{'yes' if outcome.holds else 'NO':5}{rule.metric:{width}}  {_number(outcome.value):>9}  {asked}{why}"
        )
    return lines


def _rule(entry: object, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {entry!r}, not a rule such as `{_EXAMPLE}`.")
    for key in entry:
        if key not in _KEYS:
            raise DataError(f"{where}: {key!r} is no key of a rule{nearest(str(key), _KEYS)}.")
    used = [name for name in COMPARISONS if name in entry]
    metric, plus, why = entry.get("metric"), entry.get("plus", 0.0), entry.get("why", "")
    if not isinstance(metric, str):
        raise DataError(f"{where}: `metric` must name a number of summary.json, such as `{_EXAMPLE}`.")
    if len(used) != 1:
        raise DataError(f"{where} ({metric}) has {len(used)} comparisons; it takes one of {', '.join(COMPARISONS)}.")
    limit = entry[used[0]]
    if not (isinstance(limit, str) or _is_number(limit)):
        raise DataError(f"{where} ({metric}): {used[0]} is {limit!r}; it must be a number or the name of a metric.")
    if not _is_number(plus):
        raise DataError(f"{where} ({metric}): plus is {plus!r}; it must be a number.")
    return Rule(metric, used[0], limit if isinstance(limit, str) else float(limit), float(plus), str(why))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, float | None]]:
    """Every number, and every null, with its path."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(inner, f"{path}.{name}" if path else str(name))
    elif value is None or _is_number(value):
        yield path, value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4g}"
