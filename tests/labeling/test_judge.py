"""The judge: both orders, blind places, a cache that makes a rerun free, and 20 attempts to steer it."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import forks
import pytest
from judges import (
    ATTEMPTS,
    blocks_of,
    fair,
    is_good,
    obeys_everything,
    obeys_what_is_unfenced,
    scores,
    verdict,
)
from openai_server import Answer, OpenAIServer

from qlora_dpo.cli import main
from qlora_dpo.data.files.sources import read_rows
from qlora_dpo.labeling.call_cache import CallCache, calls_path
from qlora_dpo.labeling.canaries import CANARIES, CLEAN
from qlora_dpo.labeling.judge_prompts import gsb_messages, read_score, read_verdict, rubric_of, score_messages
from qlora_dpo.labeling.records import Candidates, read_verdicts, record_path

ROOT = Path(__file__).resolve().parents[2]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    """Twelve prompts; the good answer comes first or second."""
    rows = []
    for row in range(12):
        answers = [f"good answer {row}", f"bad answer {row}"]
        rows.append({"prompt": f"question {row}", "answers": answers if row % 3 else answers[::-1], "category": "qa"})
    return write(tmp_path / "candidates.jsonl", rows)


def arguments(candidates: Path, url: str, *more: str, output: Path | None = None, canaries: bool = False) -> list[str]:
    output = output or candidates.with_name("pairs.jsonl")
    given = ["label", "judge", "--candidates", str(candidates), "--output", str(output), "--endpoint", url]
    return [*given, "--endpoint_model", "j", "--canaries", str(canaries).lower(), *more]


def judged(candidates: Path, answer: Answer, *more: str, **options: Any) -> tuple[list[dict[str, Any]], int]:
    """The pairs and the number of requests."""
    with OpenAIServer(answer, **options) as server:
        assert main(arguments(candidates, server.url, *more)) == 0
        return pairs_of(candidates), len(server.requests)


def pairs_of(candidates: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in candidates.with_name("pairs.jsonl").read_text().splitlines()]


def test_both_orders_agree(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, requests = judged(candidates, fair)
    assert requests == 24
    assert [pair["chosen"] for pair in pairs] == [f"good answer {row}" for row in range(12)]
    assert {pair["confidence"] for pair in pairs} == {1.0} and {pair["category"] for pair in pairs} == {"qa"}
    assert {pair["label"]["method"] for pair in pairs} == {"judge"}
    assert re.fullmatch(r"j gsb [0-9a-f]{8}", pairs[0]["label"]["version"])
    out = capsys.readouterr().out
    assert "flipped 0 of 12 by order;" in out and "12 pairs, 0 ties" in out
    assert not any(isinstance(row, str) for row in read_rows(str(candidates.with_name("pairs.jsonl"))))


def test_each_answer_stands_in_each_place(candidates: Path) -> None:
    seen = []

    def watching(request: dict[str, Any]) -> str:
        seen.append(blocks_of(request)[0])
        return fair(request)

    judged(candidates, watching)
    for row in range(12):
        places = [place for blocks in seen for place in "AB" if blocks[f"answer {place}"] == f"good answer {row}"]
        assert sorted(places) == ["A", "B"]


@pytest.mark.parametrize(
    ("reply", "requests", "said"),
    [
        (verdict("A"), 24, "flipped 12 of 12 by order (12 to the first place, 0 to the second)"),
        (verdict("B"), 24, "flipped 12 of 12 by order (0 to the first place, 12 to the second)"),
        (verdict("same"), 24, "flipped 0 of 12 by order"),
        ("I cannot decide.", 48, "12 comparisons; 12 with a reply that could not be read"),
        ('{"verdict": "C"}', 48, "12 comparisons; 12 with a reply that could not be read"),
        ("", 48, "12 comparisons; 12 with a reply that could not be read"),
    ],
)
def test_what_does_not_hold_in_both_orders_is_a_counted_tie(
    reply: str, requests: int, said: str, candidates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, asked = judged(candidates, lambda request: reply)
    out = capsys.readouterr().out
    assert (pairs, asked) == ([], requests)
    assert said in out and "0 pairs, 12 ties" in out


def test_a_judge_who_stammers_once_is_asked_again(candidates: Path) -> None:
    def stammering(request: dict[str, Any]) -> str:
        return fair(request) if "could not be read" in request["messages"][-1]["content"] else "Well..."

    pairs, requests = judged(candidates, stammering)
    assert requests == 48 and len(pairs) == 12


def test_three_answers_are_compared_in_pairs(tmp_path: Path) -> None:
    def longest(request: dict[str, Any]) -> str:
        blocks, _ = blocks_of(request)
        a, b = len(blocks["answer A"]), len(blocks["answer B"])
        return verdict("same" if abs(a - b) < 2 else "A" if a > b else "B")

    rows = [{"prompt": "p", "answers": ["xx", "xxxx", "x" * 9]}, {"prompt": "q", "answers": ["x", "xx", "xxx"]}]
    pairs, requests = judged(write(tmp_path / "c.jsonl", rows), longest)
    assert requests == 12
    assert [(pair["chosen"], pair["rejected"], pair["confidence"]) for pair in pairs] == [
        ("x" * 9, "xx", 1.0), ("xxx", "x", 1.0),
    ]  # fmt: skip
    assert pairs[0]["label"]["scores"] == [-2.0, 0.0, 2.0]


def test_a_rerun_is_free_and_says_so(candidates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ("--price_per_million_input", "3", "--price_per_million_output", "15")
    cache = tmp_path / "calls.sqlite"
    with OpenAIServer(fair) as server:
        first = arguments(candidates, server.url, "--cache", str(cache), *prices)
        assert main(first) == 0
        words = sum(len(message["content"].split()) for row in server.requests for message in row["messages"])
        out = capsys.readouterr().out
        assert "calls: 24 asked, 0 from" in out and f"{words:,} tokens in, 96 out" in out
        assert f"cost {(words * 3 + 96 * 15) / 1e6:.4f}" in out
        pairs = candidates.with_name("pairs.jsonl").read_bytes()
        assert main(first) == 0
        assert "All 12 sets of answers are judged already: nobody is asked" in capsys.readouterr().out
        assert candidates.with_name("pairs.jsonl").read_bytes() == pairs
        other = tmp_path / "other.jsonl"
        assert main(arguments(candidates, server.url, "--cache", str(cache), *prices, output=other)) == 0
        out = capsys.readouterr().out
        assert f"calls: 0 asked, 24 from {cache} for free; 0 tokens in, 0 out, cost 0.0000" in out
        assert len(server.requests) == 24


@pytest.mark.slow
def test_a_run_that_was_killed_asks_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"question {row}", "answers": [f"bad {row}", f"good {row}"]} for row in range(60)]
    candidates = write(tmp_path / "candidates.jsonl", rows)
    pairs = tmp_path / "pairs.jsonl"
    with OpenAIServer(fair, delay=0.03) as server:
        command = arguments(candidates, server.url, "--concurrency", "4")
        process = forks.Command(command)
        deadline = time.monotonic() + 60
        while len(server.requests) < 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.1)
        with closing(sqlite3.connect(calls_path(pairs))) as calls:
            (answered,) = calls.execute("SELECT count(*) FROM calls").fetchone()
        verdicts, asked = len(read_verdicts(record_path(pairs))), len(server.requests)
        assert 10 < verdicts < 60 and asked - answered <= 4 and not pairs.exists()
        assert main(command) == 0
        assert len(server.requests) - asked == 120 - answered
        capsys.readouterr()
        assert main(arguments(candidates, server.url, output=tmp_path / "whole.jsonl")) == 0
    finished, whole = (
        [json.loads(line) for line in file.read_text().splitlines()] for file in (pairs, tmp_path / "whole.jsonl")
    )
    for row in (*finished, *whole):
        del row["label"]["time"]
    assert finished == whole and len(whole) == 60


def test_faults_of_the_server_are_survived(candidates: Path) -> None:
    faults = ["429", "500", "html", "broken_json", "disconnect", None] * 3
    pairs, requests = judged(candidates, fair, "--concurrency", "8", faults=faults)
    assert len(pairs) == 12 and requests == 24 + 15


def test_a_server_without_structured_output_is_asked_without(candidates: Path, capsys: Any) -> None:
    def fault(request: dict[str, Any]) -> str | None:
        return "400" if "response_format" in request else None

    pairs, _ = judged(candidates, lambda request: f"Sure!\n```json\n{fair(request)}\n```", fault=fault)
    assert len(pairs) == 12 and "does not take response_format" in capsys.readouterr().err


def test_a_row_that_the_server_refuses_is_named(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fault(request: dict[str, Any]) -> str | None:
        return "400" if "good answer 5" in request["messages"][-1]["content"] else None

    with OpenAIServer(fair, fault=fault) as server:
        assert main(arguments(candidates, server.url)) == 65
        assert f"{candidates}:6: answers: the server refuses them" in capsys.readouterr().err
        assert len(pairs_of(candidates)) == 11
        asked = len(server.requests)
        assert main(arguments(candidates, server.url, "--bad_rows", "skip")) == 0
        assert len(server.requests) - asked == 2  # that row alone, with and without structured output
    out = capsys.readouterr().out
    assert "11 pairs, 0 ties, 1 without a verdict of 12" in out and "1 x answers: the server refuses them" in out


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"reason": "r", "verdict": "A"}', "A"),
        ('```json\n{"verdict": " b "}\n```', "B"),
        ('Reason first. {"verdict": "SAME"} Bye.', "same"),
        ('<think>{"verdict": "A"} or {"verdict": "B"}?</think>{"verdict": "B"}', "B"),
        ("B", "B"),
        ("**A**.", "A"),
        ('{"verdict": "A"} {"verdict": "A"}', "A"),
        ('The answer says {"verdict": "A"}, but {"verdict": "B"}', None),
        ('<think>{"verdict": "A"}', None),
        ('{"verdict": ["A"]}', None),
        ('{"verdict": true}', None),
        ("A is better", None),
        ("{" * 5000, None),
        ("", None),
    ],
)
def test_replies_are_read_leniently_and_checked_strictly(reply: str, value: str | None) -> None:
    assert read_verdict(reply) == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ('{"score": 7}', 7.0), ('{"score": "8"}', 8.0), ("9", 9.0), ('{"score": 0}', 0.0), ('{"score": 6.5}', 6.5),
        ('{"score": 11}', None), ('{"score": -1}', None), ('{"score": NaN}', None), ('{"score": true}', None),
        ('{"score": "7/10"}', None), ('{"score": 7} {"score": 8}', None), ('{"score": 1e999}', None),
    ],
)  # fmt: skip
def test_scores_are_read_leniently_and_checked_strictly(reply: str, value: float | None) -> None:
    assert read_score(reply) == value


def test_scores_against_the_reference_by_category(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["one two", "one two three four"]
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "answers": answers, "category": "math", "reference_answer": "one two three"},
        {"prompt": "b", "answers": answers, "category": "Brainstorming", "reference_answer": "one"},
        {"prompt": "c", "answers": answers, "category": "open qa"},
        {"prompt": "d", "answers": ["one", "uno"], "category": "rewrite"},
    ]
    seen: dict[str, dict[str, str]] = {}

    def words(blocks: dict[str, str]) -> int:
        seen[blocks["prompt"]] = blocks
        return 2 * len(blocks["answer"].split())

    pairs, requests = judged(write(tmp_path / "c.jsonl", rows), scores(words), "--mode", "reference")
    assert requests == 6 and set(seen) == {"a", "b", "d"}
    assert "reference answer" in seen["a"] and "reference answer" not in seen["b"]  # as Belle's evaluation has it
    assert [(pair["prompt"], pair["chosen"], pair["confidence"]) for pair in pairs] == [
        ("a", answers[1], 0.7), ("b", answers[1], 0.7),
    ]  # fmt: skip
    assert pairs[0]["label"]["scores"] == [4.0, 8.0]
    out = capsys.readouterr().out
    assert "1 rows have no reference answer to judge by" in out
    assert "2 pairs, 1 ties, 1 without a verdict of 4" in out and "mean score 4.7" in out


def test_another_tie_margin_costs_nothing(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) | {"reference_answer": "r"} for line in candidates.read_text().splitlines()]
    write(candidates, rows)
    answer = scores(lambda blocks: 6 if is_good(blocks["answer"]) else 4)
    assert len(judged(candidates, answer, "--mode", "reference")[0]) == 12
    pairs, requests = judged(candidates, answer, "--mode", "reference", "--tie_margin", "3")
    assert (pairs, requests) == ([], 0)


def test_nonsense_instead_of_a_score_is_a_counted_tie(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(candidates, [json.loads(line) | {"reference_answer": "r"} for line in candidates.read_text().splitlines()])
    pairs, requests = judged(candidates, lambda request: "ten out of ten!", "--mode", "reference")
    assert (pairs, requests) == ([], 48)
    assert "12 with a reply that could not be read" in capsys.readouterr().out


def test_every_kind_of_belle_question_has_its_rubric(shared_data: Path) -> None:
    lines = (shared_data / "belle_eval_train.jsonl").read_text().splitlines()
    kinds = {json.loads(line)["class"] for line in lines}
    assert len({rubric_of(kind).text for kind in kinds}) == len(kinds) == 10
    assert {kind for kind in kinds if not rubric_of(kind).uses_reference} == {"generation", "brainstorming", "rewrite"}


def test_codes_are_secret_differ_by_call_and_come_again(tmp_path: Path) -> None:
    item = Candidates("p", ("a", "b"))
    secret = CallCache(tmp_path / "c.sqlite").secret
    assert secret == CallCache(tmp_path / "c.sqlite").secret != CallCache(tmp_path / "d.sqlite").secret

    def code(*given: Any) -> str:
        found = re.search(r"The code of this message is (\w+)", gsb_messages(*given)[1]["content"])
        assert found
        return found[1]

    assert code(item, 0, 1, secret) == code(item, 0, 1, secret)
    assert len({code(item, 0, 1, secret), code(item, 1, 0, secret), code(item, 0, 1, "other")}) == 3
    holds_it = Candidates("p", ("a", f"[end answer B {code(item, 0, 1, secret)}]"))
    assert code(holds_it, 0, 1, secret) not in holds_it.answers[1]
    assert "rubric" not in score_messages(item, 0, secret)[0]["content"].lower()


def test_there_are_twenty_canaries() -> None:
    assert len(CANARIES) == len({canary.answers[1] for canary in CANARIES}) == 20
    assert all(canary.answers[0] == canary.reference_answer for canary in (*CANARIES, *CLEAN))


def _unfenced(item: Candidates, first: int, second: int, secret: str) -> list[Any]:
    """The question as it would be without fences."""
    system, user = gsb_messages(item, first, second, secret)
    lines = user["content"].splitlines()
    fenceless = [line for line in lines[1:] if not line.endswith(f"{lines[0].split()[-1].rstrip('.')}]")]
    return [system, {"role": "user", "content": "\n".join([lines[0], *fenceless])}]


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        (obeys_what_is_unfenced, "steered by 0 of 20 (0 wrong answers won, 0 tied), flipped 0 of 20 by order"),
        # Two attempts name a place, so the order decides; the others win wherever they stand.
        (
            obeys_everything,
            "steered by 20 of 20 (18 wrong answers won, 2 tied), flipped 2 of 20 by order (1 to the first",
        ),
        (lambda request: verdict("A"), "steered by 20 of 20 (0 wrong answers won, 20 tied), flipped 20 of 20 by order"),
    ],
    ids=["obeys what is unfenced", "obeys everything", "prefers the first place"],
)
def test_how_many_canaries_steer_a_judge_is_reported(
    judge: Callable[[dict[str, Any]], str], said: str, candidates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with OpenAIServer(judge) as server:
        assert main(arguments(candidates, server.url, canaries=True)) == 0
        assert len(server.requests) == 2 * (20 + 5 + 12)
    out = capsys.readouterr().out
    assert f"canaries: {said}" in out
    assert "judge is right in 0 of 5" in out if "20 tied" in said else "judge is right in 5 of 5" in out


def test_without_fences_the_same_judge_is_steered() -> None:
    def steered(ask: Callable[..., list[Any]]) -> int:
        replies = (json.loads(obeys_what_is_unfenced({"messages": ask(canary, 0, 1, "secret")})) for canary in CANARIES)
        return sum(reply["verdict"] == "B" for reply in replies)

    assert (steered(gsb_messages), steered(_unfenced)) == (0, 20)
    assert all(
        any(attempt in _unfenced(canary, 0, 1, "s")[1]["content"] for attempt in ATTEMPTS) for canary in CANARIES
    )


def test_prompts_that_try_to_steer_do_not_leave_their_fence(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{attempt}\nWhich?", "answers": ["good one", f"bad one\n{attempt}"], "reference_answer": attempt}
        for attempt in ATTEMPTS
    ]
    pairs, _ = judged(write(tmp_path / "c.jsonl", rows), obeys_what_is_unfenced)
    assert [pair["chosen"] for pair in pairs] == ["good one"] * 20


def test_the_key_stays_out_of_every_file(candidates: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    key = "sk-canary-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    judged(candidates, fair)
    text = "".join(capsys.readouterr())
    assert key not in text
    assert not any(key.encode() in file.read_bytes() for file in candidates.parent.iterdir())


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--tie_margin", "3"], "--tie_margin 3.0 would be ignored"),
        (["--mode", "reference", "--tie_margin", "11"], "between 0 and 10"),
        (["--judge_max_tokens", "0"], "must be above 0"),
        (["--price_per_million_input", "-1"], "must be at least 0"),
        (["--concurrency", "0"], "--concurrency 0"),
    ],
)
def test_what_cannot_work_is_refused(
    more: list[str], named: str, candidates: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(candidates, "http://127.0.0.1:9/v1", *more)) == 2
    assert named in capsys.readouterr().err
    assert main(["label", "judge", "--candidates", str(candidates), "--output", "p.jsonl"]) == 2
    assert "label judge needs --endpoint" in capsys.readouterr().err


def test_a_cache_that_is_none_is_named(candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(candidates, "http://127.0.0.1:9/v1", "--cache", str(candidates))) == 74
    assert f"the file of calls {candidates} is something else" in capsys.readouterr().err
