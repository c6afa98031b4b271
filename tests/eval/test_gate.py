"""The gate: which rules hold, what they say when they cannot be understood, and the exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparisons import row

from eval.answers import Verdict, write_summary
from eval.cli import main
from eval.gate import DEFAULT_RULES, read_rules
from eval.summary import summarize

SUMMARY: dict[str, Any] = {
    "prompts": 100,
    "settings": {"adapter": "runs/a", "fits": True},
    "verdicts": {"rule:chrf": {"win_rate": 0.6, "interval": [0.5, 0.69], "length_controlled_win_rate": None}},
    "rates": {"before": {"repetition": 0.02}, "after": {"repetition": 0.03}},
    "kl": None,
}


@pytest.fixture
def gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command on a summary; gives its exit code and what it said."""
    write_summary(tmp_path, SUMMARY)

    def run(rules: str, result: Path = tmp_path) -> tuple[int, str]:
        (tmp_path / "rules.yaml").write_text(rules)
        code = main(["gate", str(result), "--rules", str(tmp_path / "rules.yaml")])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("{metric: verdicts.rule:chrf.win_rate, above: 0.5}", True),
        ("{metric: verdicts.rule:chrf.interval.0, above: 0.5}", False),  # equal
        ("{metric: verdicts.rule:chrf.interval.0, at_least: 0.5}", True),
        ("{metric: verdicts.rule:chrf.interval.1, below: 0.69}", False),
        ("{metric: verdicts.rule:chrf.interval.1, at_most: 0.69}", True),
        ("{metric: rates.after.repetition, at_most: rates.before.repetition, plus: 0.02}", True),
        ("{metric: rates.after.repetition, at_most: rates.before.repetition, plus: 0.005}", False),
        ("{metric: rates.after.repetition, at_most: rates.before.repetition}", False),
        ("{metric: prompts, at_least: 100}", True),
        ("{metric: verdicts.rule:chrf.length_controlled_win_rate, above: 0}", False),  # not known
        ("{metric: kl.mean, below: 10}", False),  # not measured
    ],
)
def test_a_rule_holds_or_not_by_exit_code(gate: Any, rule: str, holds: bool) -> None:
    code, said = gate(f"- {rule}\n- {{metric: prompts, above: 1}}\n")
    assert code == (0 if holds else 1)
    assert ("All 2 rules" in said) is holds and ("1 of 2 rules" in said) is not holds
    assert ("NO   " in said) is not holds and "yes  prompts" in said


def test_the_table_has_values_limits_and_reasons(gate: Any) -> None:
    rule = "{metric: rates.after.repetition, at_most: rates.before.repetition, plus: 0.005, why: no loops}"
    _, said = gate(f"- {rule}\n- {{metric: kl.mean, below: 10}}\n")
    line = next(line for line in said.splitlines() if "repetition" in line)
    assert line.split() == (
        "NO rates.after.repetition 0.03 at most 0.025 (rates.before.repetition + 0.005) # no loops".split()
    )
    assert "not known" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("- {metric: rates.after.repetitions, below: 1}", "rule 1: 'rates.after.repetitions' is no metric"),
        ("- {metric: rates.after.repetitions, below: 1}", "the nearest is rates.after.repetition"),
        ("- {metric: prompts, below: rates.before.refusals}", "'rates.before.refusals' is no metric"),
        ("- {metric: settings.adapter, below: 1}", "'settings.adapter' is no metric"),
        ("- {metric: settings.fits, below: 2}", "'settings.fits' is no metric"),
        ("- {metric: prompts, abov: 1}", "'abov' is no key of a rule; the nearest is above"),
        ("- {metric: prompts}", "has 0 comparisons"),
        ("- {metric: prompts, above: 1, below: 3}", "has 2 comparisons"),
        ("- {above: 1}", "`metric` must name"),
        ("- {metric: prompts, above: true}", "above is True"),
        ("- {metric: prompts, above: .nan}", "above is nan"),
        ("- {metric: prompts, above: 1, plus: much}", "plus is 'much'"),
        ("- prompts above 1", "not a rule"),
        ("metric: prompts", "must be a list"),
        ("", "must be a list"),
        ("- {metric: [", "is no YAML"),
    ],
)
def test_rules_that_cannot_be_understood_are_an_error_of_their_own(gate: Any, rules: str, message: str) -> None:
    code, said = gate(rules + "\n")
    assert code == 65 and message in said


def test_run_folder_comparison_and_summary_are_the_same(gate: Any, tmp_path: Path) -> None:
    rules = "- {metric: prompts, at_least: 100}"
    (tmp_path / "compare").mkdir()
    write_summary(tmp_path / "compare", SUMMARY | {"prompts": 5})
    (tmp_path / "summary.json").rename(tmp_path / "elsewhere.json")
    for result in (tmp_path, tmp_path / "compare", tmp_path / "compare" / "summary.json"):
        code, said = gate(rules, result)
        assert code == 1 and said.splitlines()[1].split()[:3] == ["NO", "prompts", "5"]


def test_what_is_not_there_is_said(gate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("- {metric: prompts, above: 1}", tmp_path / "nowhere")[0] == 74
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "answers.jsonl").write_text('{"settings": {}}\n')
    code, said = gate("- {metric: prompts, above: 1}", tmp_path / "begun")
    assert code == 74 and "has not finished" in said
    assert main(["gate", str(tmp_path), "--rules", str(tmp_path / "no.yaml")]) == 74
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["default.yaml", "demo.yaml"])
def test_the_rules_that_come_along_name_metrics_that_there_are(name: str, gate: Any, tmp_path: Path) -> None:
    rows = [row(number, "w4", "w4 w5", reference_answer="w4 w5", fact="w4") for number in range(9)]
    verdicts = [Verdict(one.id, "rule:chrf", "after", (0.1, 0.9)) for one in rows]
    summary = summarize({"adapter": "a"}, rows, verdicts, tmp_path) | {"held_out": {"reward_accuracy": 0.95}}
    write_summary(tmp_path, summary)
    rules = DEFAULT_RULES.with_name(name)
    assert len(read_rules(rules)) >= 5
    code, said = gate(rules.read_text())
    assert code == 0 and "not known" not in said
