"""All rules of `data lint`, and what they found: in lines, as JSON, and whether it blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

from qlora_dpo.data.linting.findings import Finding, Rule
from qlora_dpo.data.linting.rows import COLUMN_RULES, REFUSED_RULES
from qlora_dpo.data.linting.sets import SET_RULES
from qlora_dpo.data.linting.texts import TEXT_RULES
from qlora_dpo.data.linting.tokens import BATCH_RULES, SAMPLE_RULES, TEMPLATE_RULES

NO_TOKENIZER = "no tokenizer was named, so the rules about tokens were left out: {rules}"

_OF_TOKENS = [*chain[Rule[Any]](TEMPLATE_RULES, BATCH_RULES, SAMPLE_RULES)]

RULES: dict[str, Rule[Any]] = {
    rule.name: rule for rule in chain[Rule[Any]](REFUSED_RULES, COLUMN_RULES, TEXT_RULES, _OF_TOKENS, SET_RULES)
}


@dataclass(slots=True)
class LintReport:
    """What was found in the pairs of one run of all rules.

    `counts` are of rows, each of which a rule names once; they may exceed what `rows` has.
    """

    pairs: int
    held_out: int
    has_tokens: bool
    counts: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[Finding]] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings in."""
        for finding in findings:
            self.counts[finding.rule] += 1
            self.rows.setdefault(finding.rule, []).append(finding)

    def blocking(self) -> list[str]:
        """The rules that found more errors than they tolerate."""
        return [name for name in self._names() if self._blocks(RULES[name])]

    def _blocks(self, rule: Rule[Any]) -> bool:
        rows = self.held_out if rule.of_held_out else self.pairs
        return rule.severity == "error" and self.counts[rule.name] > rule.tolerated * rows

    def _names(self) -> list[str]:
        """The rules that found something, those that block first, in the order of the tables."""
        found = [name for name in RULES if self.counts[name]]
        return sorted(found, key=lambda name: not self._blocks(RULES[name]))

    def lines(self, shown: int) -> list[str]:
        """The first rows that each rule found, then a table of the rules."""
        lines = []
        for name in self._names():
            lines += [str(finding) for finding in self.rows[name][:shown]]
            if self.counts[name] > shown:
                lines.append(f"  ... and {self.counts[name] - shown:,} more rows of {name}")
        width = max(map(len, self._names()), default=0)
        if lines:
            lines += ["", f"  {'':7}  {'rule':{width}}  {'rows':>7}  what to do"]
        for name in self._names():
            rule = RULES[name]
            lines.append(f"  {self._verdict(rule):7}  {name:{width}}  {self.counts[name]:7,}  {rule.advice}")
        return [*lines, *self._notes(), self.summary()]

    def _verdict(self, rule: Rule[Any]) -> str:
        return "error" if self._blocks(rule) else "warning"

    def _notes(self) -> list[str]:
        notes = (
            [] if self.has_tokens else [NO_TOKENIZER.format(rules=", ".join(rule.name for rule in _OF_TOKENS)) + "."]
        )
        for name in self._names():
            rule = RULES[name]
            if rule.severity == "error" and not self._blocks(rule):
                of = "held-out pairs" if rule.of_held_out else "pairs"
                notes.append(f"{name} blocks only above {rule.tolerated:.0%} of the {of}.")
        return notes

    def summary(self) -> str:
        """One sentence."""
        blocking = self.blocking()
        warning = [name for name in self._names() if name not in blocking]
        held_out = f", {self.held_out:,} of them held out" if self.held_out else ""
        found = {"errors": ", ".join(blocking), "warnings": ", ".join(warning)}
        words = "; ".join(f"{kind}: {names}" for kind, names in found.items() if names)
        return f"lint: {self.pairs:,} pairs{held_out}; {words or 'nothing was found'}."

    def as_json(self, rows: int | None = None) -> dict[str, Any]:
        """The whole report, with the first `rows` rows of each rule."""
        return {
            "pairs": self.pairs,
            "held_out": self.held_out,
            "has_tokens": self.has_tokens,
            "blocking": self.blocking(),
            "rules": {
                name: {
                    "severity": RULES[name].severity,
                    "blocks": self._blocks(RULES[name]),
                    "looks_at": RULES[name].looks_at,
                    "advice": RULES[name].advice,
                    "count": self.counts[name],
                    "rows": [asdict(finding) for finding in self.rows[name][:rows]],
                }
                for name in self._names()
            },
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LintReport:
        """The report that `as_json` was made of, as far as it holds its rows.

        Raises:
            KeyError, TypeError: it is none of this version.
        """
        rules = content["rules"]
        return cls(
            content["pairs"],
            content["held_out"],
            content["has_tokens"],
            Counter({RULES[name].name: int(found["count"]) for name, found in rules.items()}),
            {name: [Finding(**row) for row in found["rows"]] for name, found in rules.items()},
        )
