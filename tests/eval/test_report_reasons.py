"""Why the chosen reward is negative: another story for each way that the log-probs can go, with the run's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from report_runs import CONFIG, row

from eval.report.curves import LIMIT, PER_TOKEN
from eval.report.reasons import LAST, Shift, reasons, shift_of, with_settings
from eval.report.sentences import SENTENCES
from eval.report.words import words_in
from qlora_dpo.objectives.metrics import CHOSEN_SHIFT
from qlora_dpo.training import displacement


def shift(chosen: float, rejected: float, *, per_token: float | None = -0.01, **values: Any) -> Shift:
    """Rewards in the last evaluation, at beta 0.1."""
    known = {"accuracy": 0.9, "beta": 0.1, "is_held_out": True, "training_margin": 1.0}
    return Shift(chosen, rejected, chosen_per_token=per_token, **known | values)


CASES = [
    ("apart", shift(0.3, -0.5, per_token=0.02), "ok", "It is not: the chosen answers became likelier and the rejected"),
    ("both_up", shift(0.5, 0.2, per_token=0.02), "ok", "both kinds of answers became likelier, the chosen ones more"),
    ("slight", shift(-0.2, -0.8, per_token=-0.05), "ok", "slightly less likely too"),
    ("deep", shift(-2.0, -2.5, per_token=-0.4), "warn", "likelihood displacement"),
    ("unmeasured", shift(-0.2, -0.8, per_token=None), "ok", "less likely too, only less so"),
    ("reversed", shift(-0.4, 0.6), "bad", "the opposite of its labels"),
    ("behind", shift(0.2, 0.5), "bad", "the preference was not learned"),
    ("behind", shift(-0.5, -0.2, training_margin=-0.1), "bad", "the preference was not learned"),
    ("memorized", shift(-0.4, 0.1, training_margin=2.0), "bad", "although the training pairs were learned"),
    ("still", shift(-0.001, -0.002), "ok", "Nothing has moved yet"),
    ("unknown", shift(math.nan, -1.0), "bad", "Nobody can tell"),
]


def broken(one: Shift) -> Shift:
    """The same where the training pairs were not learned either."""
    return Shift(**{name: getattr(one, name) for name in Shift.__dataclass_fields__} | {"training_margin": -1.0})


@pytest.mark.parametrize(("case", "found", "tone", "words"), CASES)
def test_each_case_has_its_story(case: str, found: Shift, tone: str, words: str) -> None:
    found = broken(found) if case in {"reversed", "behind"} else found
    assert found.case == case
    said = reasons(found, CONFIG, words_in("en"))
    assert (said["case"], said["tone"]) == (case, tone)
    assert words in said["verdict"]
    assert said["verdict"].startswith(("Because", "It is not", "The ", "On ", "Nothing", "Nobody"))
    assert "{" not in "".join(map(str, said.values()))
    assert bool(said["numbers"]) == (case not in {"still", "unknown"})
    chinese = reasons(found, CONFIG, words_in("zh"))
    assert chinese["verdict"] != said["verdict"] and "{" not in str(chinese["numbers"])


def test_every_story_is_different_and_told() -> None:
    told = {case for case, *_ in CASES}
    assert told == {name.removeprefix("verdict_") for name in SENTENCES if name.startswith("verdict_")}
    for kind in ("verdict_", "reason_"):
        texts = [texts for name, texts in SENTENCES.items() if name.startswith(kind)]
        assert len(set(texts)) == len(texts) == len(told)


def test_numbers_are_those_of_the_run() -> None:
    said = reasons(shift(-0.2, -0.8, per_token=-0.05), CONFIG, words_in("en"))["numbers"]
    for words in (
        "On the held-out pairs a chosen answer lost 2 nats (−0.05 nats per token) and is 7.39 times less likely",
        "a rejected one lost 8 nats", "25 % of the rejected answers' fall is displacement", "The other 75 %",
        "a margin of 0.6 and the chosen answer is ahead in 90 % of the pairs",
    ):  # fmt: skip
        assert words in said
    assert "10^43 times" in reasons(shift(-10.0, -20.0), CONFIG, words_in("en"))["numbers"]


def test_advice_names_settings_with_their_values() -> None:
    deep = shift(-2.0, -2.5, per_token=-0.4)
    advice = str(reasons(deep, CONFIG, words_in("en"))["advice"])
    assert '<a href="#setting-learning_rate"><code>--learning_rate</code></a> (1e-05)' in advice
    assert "--on_displacement" in advice and "add sft" in advice
    held = str(reasons(deep, CONFIG | {"loss_type": ["sigmoid", "sft"]}, words_in("en"))["advice"])
    assert "raise the weight of sft" in held and "add sft" not in held
    assert str(with_settings("<[[beta]]", {"beta": "<b>"})) == (
        '&lt;<a href="#setting-beta"><code>--beta</code></a> (&lt;b&gt;)'
    )


def test_held_out_pairs_decide_where_there_are_some() -> None:
    rows = [row(step, 1.0, 0.0) for step in range(1, 31)]
    of_training = shift_of(rows, 0.1)
    assert of_training is not None and not of_training.is_held_out and of_training.chosen == pytest.approx(10)
    rows[9] |= {f"eval_{key}": value for key, value in row(10, -1.0, -2.0).items() if key != "step"}
    held_out = shift_of(rows, 0.1)
    assert held_out is not None and held_out.is_held_out and held_out.chosen == pytest.approx(-10)
    assert held_out.training_margin == 1.0


def test_last_training_steps_are_averaged_without_what_is_not_finite() -> None:
    rows = [row(step, 99.0, 99.0) for step in range(1, 11)] + [row(step, -1.0, -3.0) for step in range(11, 11 + LAST)]
    rows[-1] = row(99, 0.0, 0.0) | {"rewards/chosen": math.nan, "rewards/rejected": math.inf}
    found = shift_of(rows, 0.5)
    assert found is not None and (found.chosen, found.rejected) == (-2.0, -6.0)
    all_bad = shift_of([rows[-1]], 0.5)
    assert all_bad is not None and all_bad.case == "unknown"


def test_without_rewards_there_is_no_story() -> None:
    assert shift_of([], 0.1) is None
    assert shift_of([{"step": 1, "loss": 2.0}], 0.1) is None
    assert shift_of([row(1, 0.0, 0.0)], 0.0) is None


def test_limit_and_metric_are_those_of_training() -> None:
    assert LIMIT == displacement.LIMIT
    assert PER_TOKEN[0] == CHOSEN_SHIFT
