"""Verdicts: rules by hand, a reward model's own scores, a judge in both orders; nobody is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import row
from openai_server import OpenAIServer
from tiny import tiny_config, tiny_tokenizer

from eval.answers import Row, Verdict, VerdictFile
from eval.options import VerdictOptions
from eval.verdicts import check_verdicts, give_verdicts
from qlora_dpo.config.labeling import EndpointOptions
from qlora_dpo.config.values import Names
from qlora_dpo.errors import UsageError

NOBODY = EndpointOptions()


@pytest.fixture
def give(tmp_path: Path) -> Any:
    """Verdicts about rows, by method and row number."""

    def run(rows: list[Row], server: EndpointOptions = NOBODY, **options: Any) -> dict[tuple[str, int], Verdict]:
        record = VerdictFile(tmp_path)
        run.noted = give_verdicts(rows, record, VerdictOptions(**options), server, tmp_path, use_cpu=True)  # type: ignore[attr-defined]
        return {(found.method, int(found.id, 16)): found for found in record.verdicts()}

    return run


def test_rules_hold_both_answers_against_the_reference(give: Any) -> None:
    rows = [
        row(0, "w9", "the cat sat on the mat", reference_answer="the cat sat on a mat"),
        row(1, "It is Rome.", "It is Rome, the old one.", reference_answer="It is Rome."),
        row(2, "w3", "w4"),  # no reference answer
        row(3, "Paris", "it may be Lyon", reference_answer="The capital is Paris.", fact="Paris"),
        row(4, "same", "same", reference_answer="other"),
    ]
    found = give(rows)
    assert {number for _, number in found} == {0, 1, 3, 4} and len(found) == 12
    f1 = found["rule:token_f1", 0]
    # five of six words are shared, "the" once only
    assert f1.scores == (0.0, pytest.approx(2 * 5 / 12)) and f1.winner == "after"
    assert found["rule:chrf", 1].scores is not None and found["rule:chrf", 1].scores[0] == pytest.approx(1.0)
    assert found["rule:chrf", 1].winner == "before"
    assert found["rule:exact", 1].scores == (1.0, 1.0)  # the end of a reference does not count
    assert found["rule:exact", 3].scores == (1.0, 0.0)  # the fact, not the whole reference answer
    assert {found[method, 4].winner for method in ("rule:chrf", "rule:token_f1", "rule:exact")} == {"tie"}


def test_a_margin_makes_ties_and_another_margin_decides_again(give: Any, tmp_path: Path) -> None:
    rows = [row(0, "a b c d", "a b c e", reference_answer="a b c e")]  # token F1 0.75 and 1
    assert give(rows)["rule:token_f1", 0].winner == "after"
    lines = (tmp_path / "verdicts.jsonl").read_text().count("\n")
    assert give(rows)["rule:token_f1", 0].winner == "after"
    assert (tmp_path / "verdicts.jsonl").read_text().count("\n") == lines  # not decided twice
    assert give(rows, tie_margin=0.25)["rule:token_f1", 0].winner == "tie"
    assert give(rows, tie_margin=0.24)["rule:token_f1", 0].winner == "after"


def test_reward_model_gives_its_own_scores(give: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "reward")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "reward")
    rows = [row(number, f"w{number + 20} w9", f"w{number + 60}") for number in range(5)]
    found = give(rows, reward_model=str(tmp_path / "reward"))
    for number, one in enumerate(rows):
        texts = [f"<s> {one.prompt} w5 {side.text} </s>" for side in (one.before, one.after)]
        ids = [tokenizer(text, add_special_tokens=False, return_tensors="pt") for text in texts]
        with torch.no_grad():
            expected = [model.eval()(**batch).logits[0, 0].item() for batch in ids]
        assert found["reward_model", number].scores == pytest.approx(expected, abs=1e-5)
        winner = "after" if expected[1] > expected[0] else "before"
        assert found["reward_model", number].winner == winner
    assert {found["reward_model", number].winner for number in range(5)} == {"before", "after"}
    assert give.noted["reward_model"]["model"] == str(tmp_path / "reward")


def says(better: str) -> Any:
    """A judge who knows the better answer by a word, wherever it stands; `A` likes the first place."""

    def reply(request: dict[str, Any]) -> str:
        text = request["messages"][-1]["content"]
        first = text.index("good") < text.index("poor")
        verdict = better if better in "AB" else ("A" if first else "B")
        return json.dumps({"reason": "because", "verdict": verdict})

    return reply


def endpoint(server: OpenAIServer) -> EndpointOptions:
    return EndpointOptions(endpoint=Names([server.url]), endpoint_model="j", retries=0)


def test_judge_sees_both_orders_and_equal_answers_cost_nothing(give: Any) -> None:
    rows = [row(0, "poor w3", "good w4"), row(1, "good w5", "poor w6"), row(2, "good poor", "good poor")]
    with OpenAIServer(says("knows")) as server:
        found = give(rows, endpoint(server), canaries=False)
        assert [found["judge", number].winner for number in range(3)] == ["after", "before", "tie"]
        assert found["judge", 0].scores == (-1.0, 1.0) and found["judge", 2].detail == {"same_text": True}
        assert len(server.requests) == 4
        assert give(rows, endpoint(server), canaries=False) == found and len(server.requests) == 4
    assert give.noted["judge"]["mode"] == "gsb" and give.noted["judge"]["without_verdict"] == 0


def test_judge_who_prefers_a_place_sees_ties(give: Any) -> None:
    rows = [row(0, "poor w3", "good w4"), row(1, "good w5", "poor w6")]
    with OpenAIServer(says("A")) as server:
        found = give(rows, endpoint(server), canaries=False)
    assert [found["judge", number].winner for number in range(2)] == ["tie", "tie"]


def test_judge_by_reference_leaves_out_rows_without_one_and_says_how_many(give: Any) -> None:
    def score(request: dict[str, Any]) -> str:
        return json.dumps({"reason": "r", "score": 9 if "good" in request["messages"][-1]["content"] else 2})

    rows = [row(0, "w3", "good w4", category="math", reference_answer="w4"), row(1, "w3", "good", category="math")]
    with OpenAIServer(score) as server:
        found = give(rows, endpoint(server), canaries=False, judge="reference")
    assert found["judge", 0].scores == (2.0, 9.0) and ("judge", 1) not in found
    assert give.noted["judge"]["without_verdict"] == 1


@pytest.mark.parametrize(
    ("options", "server", "message"),
    [
        ({"tie_margin": 2.0}, NOBODY, "--tie_margin 2.0"),
        ({"judge_tie_margin": 11.0}, NOBODY, "--judge_tie_margin 11.0"),
        ({"judge_max_tokens": 0}, NOBODY, "--judge_max_tokens 0"),
        ({"reward_model_in_4bit": True}, NOBODY, "no --reward_model"),
        ({"judge": "reference"}, NOBODY, "--judge reference would be ignored"),
        ({"canaries": False}, NOBODY, "--canaries False would be ignored"),
        ({}, EndpointOptions(endpoint_model="j"), "--endpoint_model j would be ignored"),
        (
            {"judge_tie_margin": 2.0},
            EndpointOptions(endpoint=Names(["http://127.0.0.1:1/v1"])),
            "--judge_tie_margin 2.0 would be ignored",
        ),
    ],
)
def test_what_cannot_work_or_would_be_ignored_is_refused(
    options: dict[str, Any], server: EndpointOptions, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_verdicts(VerdictOptions(**options), server)
    check_verdicts(VerdictOptions(), NOBODY)
