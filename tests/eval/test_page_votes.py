"""Blind votes: sides by lot, one vote a round, pairs that the tool reads, a win rate with its interval."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from comparisons import row
from pages import make_comparison

from eval.answers import read_answers, read_verdicts
from eval.page.votes import PAIRS, Ballots, Tally
from eval.statistics import wilson
from qlora_dpo.errors import StorageError
from qlora_dpo.labeling.records import load_candidates, record_path
from qlora_dpo.labeling.records import read_verdicts as read_labels


@pytest.fixture
def ballots(tmp_path: Path) -> Ballots:
    folder = make_comparison(tmp_path / "compare")
    return Ballots(folder, folder)


def test_sides_are_drawn_by_lot_and_a_token_tells_nothing(ballots: Ballots) -> None:
    drawn = [ballots.draw("w1", "before", "after") for _ in range(200)]
    lefts = sum(ballot.is_after_left for ballot in drawn)
    assert 60 < lefts < 140
    assert len({ballot.token for ballot in drawn}) == 200
    for ballot in drawn:
        assert (ballot.left, ballot.right) == (("after", "before") if ballot.is_after_left else ("before", "after"))


@pytest.mark.parametrize("vote", ["left", "right", "both_good", "both_bad"])
def test_a_vote_is_for_whoever_stood_there(ballots: Ballots, vote: str) -> None:
    ballot = ballots.draw("w1", "answer before", "answer after")
    assert ballots.vote(ballot.token, vote, "ann") == ballot  # type: ignore[arg-type]
    expected = "tie" if vote.startswith("both") else "after" if (vote == "left") == ballot.is_after_left else "before"
    tally = ballots.tally()
    assert tally == Tally(win=expected == "after", tie=expected == "tie", loss=expected == "before")
    if expected == "tie":
        assert not ballots.pairs.exists()
    else:
        (pair,) = map(json.loads, ballots.pairs.read_text().splitlines())
        assert pair["chosen"] == f"answer {expected}"
        assert pair["rejected"] != pair["chosen"]
    (label,) = read_labels(record_path(ballots.pairs)).values()
    assert (label.method, label.annotator, label.detail["vote"]) == ("human", "ann", vote)


def test_a_round_takes_one_vote_and_an_invented_token_none(ballots: Ballots) -> None:
    ballot = ballots.draw("w1", "a", "b")
    assert ballots.vote("invented", "left", "ann") is None
    assert ballots.vote(ballot.token, "left", "ann")
    assert ballots.vote(ballot.token, "right", "ann") is None
    assert ballots.tally().votes == 1


def test_votes_are_pairs_verdicts_and_a_tally_of_the_next_process(ballots: Ballots) -> None:
    rows = read_answers(ballots.folder)[1]
    for _ in range(3):
        ballot = ballots.next(rows, "ann", set())
        assert ballot is not None and ballot.row is not None
        ballots.vote(ballot.token, "left" if ballot.is_after_left else "right", "ann")
    assert ballots.next(rows, "ann", set()) is None
    assert len(load_candidates(str(ballots.folder / PAIRS))) == 3
    verdicts = read_verdicts(ballots.folder)
    assert {(one.method, one.winner, one.annotator) for one in verdicts} == {("human", "after", "ann")}
    assert {one.id for one in verdicts} == {one.id for one in rows}
    again = Ballots(ballots.folder, ballots.folder)
    assert again.tally() == Tally(win=3) and again.tally().interval == wilson(3, 3)
    assert again.next(rows, "bob", set()) is not None


def test_what_nobody_has_seen_comes_first_and_skipped_prompts_do_not_come_again(ballots: Ballots) -> None:
    rows = read_answers(ballots.folder)[1]
    first = ballots.draw(rows[0].prompt, rows[0].before.text, rows[0].after.text, rows[0])
    ballots.vote(first.token, "both_bad", "ann")
    shown = {ballots.next(rows, "bob", set()).row.id for _ in range(40)}  # type: ignore[union-attr]
    assert shown == {rows[1].id, rows[2].id}
    open_round = ballots.draw(rows[1].prompt, rows[1].before.text, rows[1].after.text, rows[1])
    key = ballots.key_of(open_round.token)
    assert key is not None
    assert {ballots.next(rows, "bob", {key}).row.id for _ in range(20)} == {rows[2].id}  # type: ignore[union-attr]


def test_conversations_are_voted_on_as_conversations(ballots: Ballots) -> None:
    prompt = (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "x"},
    )
    talk = row(7, "a", "b", prompt=prompt)
    for item in (ballots.draw(talk.prompt, "a", "b", talk), ballots.draw("text", "c", "d")):
        ballots.vote(item.token, "left", "ann")
    prompts = [item.prompt for item in load_candidates(str(ballots.pairs))]
    assert prompts == [prompt, ({"role": "user", "content": "text"},)]


def test_a_folder_that_is_gone_is_an_error_and_not_made_anew(ballots: Ballots) -> None:
    ballot = ballots.draw("w1", "a", "b")
    shutil.rmtree(ballots.folder)
    with pytest.raises(StorageError, match="not there any more"):
        ballots.vote(ballot.token, "left", "ann")
    assert not ballots.folder.exists()
    assert ballots.tally() == Tally()
