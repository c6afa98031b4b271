"""A YAML list of rules, each with a weight, checked key by key.

An entry names a rule of the table with its keys, or composes others:
`{rule: length, max: 800, weight: 2}`, `{not: {rule: refusal}}`, `{all: [...]}`, `{any: [...]}`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qlora_dpo.config.checks import nearest
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.labeling.rule_kinds import KINDS, AllOf, AnyOf, Not, Rule

RULES_VERSION = 1  # part of a verdict's version: raise it when a rule would score otherwise


@dataclass(frozen=True)
class WeightedRule:
    """One entry of a rules file."""

    name: str
    rule: Rule
    weight: float


def read_rules(file: Path) -> tuple[list[WeightedRule], str]:
    """The rules of a YAML file, and a hash that stands for them.

    Raises:
        StorageError: it cannot be read.
        UsageError: it holds something else; names the nearest known rule or key.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"--rules {file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--rules {file} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, list) or not content:
        raise UsageError(f"--rules {file} must be a list of rules, such as `- {{rule: length, max: 800, weight: 1}}`.")
    names = [_name(entry) for entry in content]
    often = Counter(names)
    rules = [
        _weighted(entry, f"{file}: rule {number}", f"{number} ({name})" if often[name] > 1 else name)
        for number, (entry, name) in enumerate(zip(content, names, strict=True), 1)
    ]
    canonical = json.dumps([RULES_VERSION, content], sort_keys=True, default=str)
    return rules, hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _name(entry: object) -> str:
    """What an entry is called in reports: its rule, or `not refusal`."""
    if not isinstance(entry, dict):
        return ""
    word = next((word for word in COMPOSITIONS if word in entry), None)
    if word is None:
        return str(entry.get("rule"))
    inner = entry[word] if isinstance(entry[word], list) else [entry[word]]
    return f"{word} {', '.join(map(_name, inner))}"


def _weighted(entry: object, where: str, name: str) -> WeightedRule:
    values = _mapping(entry, where)
    weight = values.pop("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UsageError(f"{where}: weight is {weight!r}; it must be a number above 0 (`not` turns a rule around).")
    return WeightedRule(name, _rule(values, where), float(weight))


def _rule(entry: object, where: str) -> Rule:
    values = _mapping(entry, where)
    for word, compose in COMPOSITIONS.items():
        if word in values:
            inner = values.pop(word)
            _refuse_keys(values, (), f"{where}: {word}")
            return compose(inner, f"{where}: {word}")
    if "rule" not in values:
        words = ("rule", *COMPOSITIONS)
        near = "".join(nearest(key, words) for key in values)
        raise UsageError(f"{where} names no rule: it has none of the keys {', '.join(words)}{near}.")
    name = str(values.pop("rule"))
    if name not in KINDS:
        raise UsageError(f"{where}: {name!r} is not a rule{nearest(name, KINDS)}. Known: {', '.join(KINDS)}.")
    where = f"{where} ({name})"
    _refuse_keys(values, [option.name for option in fields(KINDS[name])], where)
    return _filled(KINDS[name], values, where)


def _composed(kind: type[AllOf] | type[AnyOf], inner: object, where: str) -> Rule:
    if not isinstance(inner, list) or not inner:
        raise UsageError(f"{where} must be a list of rules (it is {inner!r:.80}).")
    return kind(tuple(_rule(entry, f"{where}[{number}]") for number, entry in enumerate(inner, 1)))


COMPOSITIONS: dict[str, Callable[[object, str], Rule]] = {
    "all": lambda inner, where: _composed(AllOf, inner, where),
    "any": lambda inner, where: _composed(AnyOf, inner, where),
    "not": lambda inner, where: Not(_rule(inner, where)),
}


def _mapping(entry: object, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise UsageError(f"{where} must be a mapping such as `{{rule: refusal}}` (it is {entry!r:.80}).")
    return dict(entry)


def _refuse_keys(values: dict[str, Any], known: Collection[str], where: str) -> None:
    for key in values:
        if key == "weight":
            raise UsageError(f"{where}: weight belongs to an entry of the list, not to a rule within one.")
        if key not in known:
            others = f" Known: {', '.join(known)}." if known else ""
            raise UsageError(f"{where}: {key!r} is not a key here{nearest(key, known)}.{others}")


def _filled(kind: type[Any], values: dict[str, Any], where: str) -> Rule:
    """The rule, its values being of the types that its fields say."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        rule: Rule = kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = f"{first['loc'][0]}: " if first["loc"] else ""
        reason = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("missing", "value_error") else f" (it is {first['input']!r:.80})"
        raise UsageError(f"{where}: {key}{reason}{found}.") from error
    return rule
