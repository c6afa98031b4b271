"""The numbers of a summary, from rows and verdicts that were made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comparisons import answer, row, sample

from eval.answers import Verdict, Winner
from eval.statistics import bootstrap_mean
from eval.summary import divergence, held_out, majority, summarize, table
from qlora_dpo.reference.intervals import wilson

SETTINGS = {"adapter": "runs/a"}


def verdict(number: int, winner: Winner, scores: tuple[float, float] | None = None, **changes: Any) -> Verdict:
    return Verdict(f"{number:016x}", changes.pop("method", "rule:chrf"), winner, scores, **changes)


def test_counts_rates_and_categories() -> None:
    rows = [row(number, category="math" if number < 2 else "code") for number in range(5)] + [row(5)]
    verdicts = [
        verdict(0, "after", (0.1, 0.7)), verdict(1, "tie", (0.5, 0.5)), verdict(2, "after", (0.2, 0.4)),
        verdict(3, "before", (0.9, 0.6)), verdict(4, "after", (0.0, 1.0)), verdict(99, "before", (1.0, 0.0)),
    ]  # fmt: skip
    found = summarize(SETTINGS, rows, verdicts, Path("nowhere"))
    assert found["prompts"] == 6 and found["settings"] == SETTINGS
    of = found["verdicts"]["rule:chrf"]
    assert (of["win"], of["tie"], of["loss"], of["prompts"]) == (3, 1, 1, 5)
    assert of["win_rate"] == 3.5 / 5 and of["interval"] == wilson(3.5, 5)
    differences = [0.6, 0.0, 0.2, -0.3, 1.0]
    assert of["score_difference"]["mean"] == pytest.approx(1.5 / 5)
    assert of["score_difference"]["interval"] == pytest.approx(bootstrap_mean(differences))
    assert of["length_controlled_win_rate"] == 3.5 / 5  # all answers are of one length
    math = of["by_category"]["math"]
    assert (math["win"], math["tie"], math["loss"], math["win_rate"]) == (1, 1, 0, 0.75)
    assert of["by_category"]["code"]["interval"] == wilson(2, 3)
    assert found["seconds"] == 6.0 and found["kl"] is None and found["held_out"] is None
    assert json.loads(json.dumps(found, allow_nan=False))["verdicts"]["rule:chrf"]["win"] == 3


def test_rewards_are_the_means_of_both_sides() -> None:
    rows = [row(n, answer(reward=-1.0 * n), answer(reward=2.0 * n)) for n in range(3)]
    assert summarize(SETTINGS, rows, [], Path("nowhere"))["rewards"] == {"before": -1.0, "after": 2.0}


def test_kl_is_the_mean_log_ratio_of_what_the_policy_drew() -> None:
    rows = [row(0, sample=sample(4, -3.0, -5.0)), row(1), row(2, sample=sample(6, -2.0, -1.5))]
    found = divergence(rows)
    assert found is not None
    assert (found["mean"], found["per_token"], found["samples"]) == (0.75, 1.5 / 10, 2)
    assert found["interval"] == (-0.5, 2.0)


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        (["after"], "after"),
        (["after", "after", "before"], "after"),
        (["after", "before"], "tie"),
        (["after", "after", "before", "tie"], "tie"),  # half is not more than half
        (["before", "before", "tie"], "before"),
    ],
)
def test_what_more_than_half_of_the_people_say_counts(votes: list[Winner], winner: Winner) -> None:
    given = [verdict(0, vote, method="human", annotator=str(number)) for number, vote in enumerate(votes)]
    assert majority(given).winner == winner
    found = summarize(SETTINGS, [row(0)], given, Path("nowhere"))["verdicts"]["human"]
    assert found["prompts"] == 1 and found["tie"] == (winner == "tie") and found["score_difference"] is None


def test_held_out_numbers_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    lines = [{"step": step, "eval_rewards/accuracies": step / 10, "eval_rewards/margins": step} for step in (2, 4, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 9}]))
    assert held_out(tmp_path) is None  # no run
    (tmp_path / "config.yaml").write_text("{}")
    assert held_out(tmp_path) == {"reward_accuracy": 0.8, "margin": 8, "step": 8}
    (tmp_path / "checkpoint-5").mkdir()
    assert held_out(tmp_path / "checkpoint-5") == {"reward_accuracy": 0.4, "margin": 4, "step": 4}
    (tmp_path / "checkpoint-1").mkdir()
    assert held_out(tmp_path / "checkpoint-1") is None


def test_table_has_every_method_and_says_what_is_not_there() -> None:
    rows = [row(number, "w3", "w4 w5 w6", category="ab"[number % 2], fact="w3") for number in range(4)]
    verdicts = [
        verdict(number, "after", (0.0, 1.0), method=method) for number in range(4) for method in ("judge", "rule:chrf")
    ]
    text = "\n".join(table(summarize(SETTINGS, rows, verdicts, Path("nowhere"))))
    assert text.index("rule:chrf") < text.index("judge") < text.index("category")
    assert "1.000 (0.510 to 1.000)" in text
    assert "at equal length not known: every answer after is longer" in text and "0 of 4" in text
    assert "KL" not in text and "held-out" not in text
    assert "No verdicts" in "\n".join(table(summarize(SETTINGS, rows, [], Path("nowhere"))))
