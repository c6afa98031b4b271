"""What goes wrong with answers, counted by hand."""

from __future__ import annotations

import pytest
from comparisons import answer, row

from eval.rates import contains, facts, rates
from eval.statistics import wilson


def test_rates_of_a_few_answers() -> None:
    found = rates([
        answer("I'm sorry, but I cannot help with that.", tokens=10),
        answer("抱歉，我无法回答这个问题。", tokens=8),
        answer("a b c d a b c d", tokens=9, finish_reason="length"),  # 5 runs of 4 words, the last is the first
        answer("", tokens=1),
        answer("The capital is Paris.", tokens=7),
    ])  # fmt: skip
    assert found == pytest.approx({
        "refusal": 2 / 5, "repetition": (1 / 5) / 5, "missing_end": 1 / 5, "empty": 1 / 5, "mean_tokens": 35 / 5,
    })  # fmt: skip


def test_an_answer_that_speaks_of_refusing_later_on_refuses_nothing() -> None:
    text = "Penguins are birds of the southern hemisphere. " * 6 + "I cannot say more."
    assert rates([answer(text)])["refusal"] == 0
    assert rates([answer(text)])["repetition"] > 0.5


@pytest.mark.parametrize(
    ("text", "fact", "expected"),
    [
        ("The capital is  PARIS.", "Paris", True),
        ("Parisian", "Paris", False),
        ("It is 12 dollars.", "12", True),
        ("It is 120 dollars.", "12", False),
        ("It is 3.12 dollars.", "12", False),
        ("It is 12.5 dollars.", "12", False),
        ("It is -12 degrees.", "12", False),
        ("It is 12.", "12", True),
        ("twenty-two", "two", False),
        ("答案是１２。", "12", True),
        ("首都是布宜诺斯艾利斯。", "布宜诺斯艾利斯。", True),
        ("首都是惠灵顿。", "布宜诺斯艾利斯", False),
        ("3 hours\nand 25 minutes", "3 hours and 25 minutes", True),
        ("[2, 6]", "[2, 6]", True),
        ("anything", " . ", False),
    ],
)
def test_a_fact_is_found_as_a_whole(text: str, fact: str, expected: bool) -> None:
    assert contains(text, fact) is expected


def test_facts_that_are_kept_lost_and_gained() -> None:
    rows = [
        row(0, "Paris", "It is Paris.", fact="Paris"),
        row(1, "Rome", "It is Milan.", fact="Rome"),
        row(2, "Bern", "It is Bern.", fact="Bern"),
        row(3, "Oslo?", "It is Riga.", fact="Riga"),
        row(4, "no fact", "none"),
    ]
    assert facts(rows) == {
        "prompts": 4, "before": 3 / 4, "after": 3 / 4, "right_before": 3, "still_right": 2, "kept": 2 / 3,
        "kept_interval": wilson(2, 3),
    }  # fmt: skip
    assert facts(rows[4:]) is None
    nothing = facts([row(0, "x", "y", fact="z")])
    assert nothing is not None and nothing["kept"] is None
