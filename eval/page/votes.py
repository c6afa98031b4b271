"""Blind votes: the sides are drawn here and named only after the vote; each vote is on the disk before it counts.

Votes go into the record `votes.labels.jsonl` and, where one answer is better, into `votes.jsonl` as pairs that `label`
and `data` read; those about recorded answers also into the verdicts of the comparison.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eval.answers import Row, VerdictFile, Winner
from eval.answers import Verdict as ComparisonVerdict
from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import StorageError
from qlora_dpo.labeling.record_file import RecordFile
from qlora_dpo.labeling.records import Candidates, Record, Verdict, now, record_path, refuse_unlabelled
from qlora_dpo.reference.intervals import Interval, wilson

PAIRS = "votes.jsonl"
PAGE_VERSION = "app 1"
MOST_ROUNDS = 1000  # that wait for a vote

Vote = Literal["left", "right", "both_good", "both_bad"]
VOTES: tuple[Vote, ...] = ("left", "right", "both_good", "both_bad")


@dataclass(frozen=True)
class Ballot:
    """A prompt with two answers, one on each side."""

    token: str
    """What a vote names; it tells nothing about the sides."""
    prompt: str | tuple[Message, ...]
    before: str
    after: str
    is_after_left: bool
    row: Row | None = None
    """Of the comparison, where it is from there."""

    @property
    def left(self) -> str:
        """The answer on the left."""
        return self.after if self.is_after_left else self.before

    @property
    def right(self) -> str:
        """The answer on the right."""
        return self.before if self.is_after_left else self.after

    def winner(self, vote: Vote) -> Winner:
        """Whom a vote is for."""
        if vote in ("both_good", "both_bad"):
            return "tie"
        return "after" if (vote == "left") == self.is_after_left else "before"


@dataclass(frozen=True)
class Tally:
    """How the votes stand."""

    win: int = 0
    tie: int = 0
    loss: int = 0

    @property
    def votes(self) -> int:
        """All of them."""
        return self.win + self.tie + self.loss

    @property
    def rate(self) -> float:
        """Share of `after`; a tie is half a win."""
        return (self.win + self.tie / 2) / self.votes

    @property
    def interval(self) -> Interval:
        """Wilson's, 95 %."""
        return wilson(self.win + self.tie / 2, self.votes)


class Ballots:
    """The rounds that are open, and the votes that were given."""

    def __init__(self, folder: Path, comparison: Path | None) -> None:
        self.folder, self._comparison = folder, comparison
        self._lock = threading.Lock()
        self._open: OrderedDict[str, Ballot] = OrderedDict()
        self._record = Record(record_path(folder / PAIRS)) if record_path(folder / PAIRS).is_file() else None

    @property
    def pairs(self) -> Path:
        """The file of pairs."""
        return self.folder / PAIRS

    def draw(self, prompt: str | tuple[Message, ...], before: str, after: str, row: Row | None = None) -> Ballot:
        """Put two answers on sides, by lot."""
        ballot = Ballot(secrets.token_urlsafe(16), prompt, before, after, bool(secrets.randbits(1)), row)
        with self._lock:
            self._open[ballot.token] = ballot
            while len(self._open) > MOST_ROUNDS:
                self._open.popitem(last=False)
        return ballot

    def next(self, rows: Sequence[Row], voter: str, skipped: set[str]) -> Ballot | None:
        """One of the recorded prompts with the fewest votes, by lot; None where the voter has seen all."""
        votes: Counter[str] = Counter()
        own = set(skipped)
        for (key, annotator), _ in self._verdicts().items():
            votes[key] += 1
            if annotator == voter:
                own.add(key)
        left = [
            (row, key)
            for row in rows
            if (key := _candidates(row.prompt, row.before.text, row.after.text).key) not in own
        ]
        if not left:
            return None
        fewest = min(votes[key] for _, key in left)
        row = secrets.choice([row for row, key in left if votes[key] == fewest])
        return self.draw(row.prompt, row.before.text, row.after.text, row)

    def key_of(self, token: str) -> str | None:
        """What the answers of an open round are known by."""
        ballot = self._open.get(token)
        return None if ballot is None else _candidates(ballot.prompt, ballot.before, ballot.after).key

    def vote(self, token: str, vote: Vote, voter: str) -> Ballot | None:
        """Keep a vote; None where the round is over, or never was.

        Raises:
            StorageError: the vote cannot be kept; the round stays open.
        """
        with self._lock:
            ballot = self._open.get(token)
            if ballot is None:
                return None
            if not self.folder.is_dir():
                raise StorageError(f"{self.folder} is not there any more, so the vote is not kept.")
            self._keep(ballot, vote, voter)
            del self._open[token]
            return ballot

    def tally(self) -> Tally:
        """All votes about these answers, of everybody."""
        counts = Counter(verdict.chosen for verdict in self._verdicts().values())
        return Tally(win=counts[1], tie=counts[None], loss=counts[0])

    def _verdicts(self) -> dict[tuple[str, str | None], Verdict]:
        return self._record.verdicts() if self._record and self.folder.is_dir() else {}

    def _keep(self, ballot: Ballot, vote: Vote, voter: str) -> None:
        winner = ballot.winner(vote)
        item = _candidates(ballot.prompt, ballot.before, ballot.after)
        chosen, rejected = {"before": (0, 1), "after": (1, 0), "tie": (None, None)}[winner]
        detail = {"vote": vote, "left": "after" if ballot.is_after_left else "before"}
        self._record = self._record or Record(record_path(self.pairs))
        self._record.add(Verdict(item.key, chosen, rejected, (), 1.0, "human", PAGE_VERSION, now(), voter, detail))
        if chosen is not None:
            pairs = RecordFile(self.pairs, b'{"prompt": ', refuse_unlabelled)
            pairs.append(_pair_line(ballot, winner, item.key, voter))
        if ballot.row is not None and self._comparison is not None:
            verdict = ComparisonVerdict(ballot.row.id, "human", winner, None, detail, PAGE_VERSION, now(), voter)
            VerdictFile(self._comparison).add(verdict)


def _candidates(prompt: str | tuple[Message, ...], before: str, after: str) -> Candidates:
    return Candidates(prompt, (before, after))


def _pair_line(ballot: Ballot, winner: Winner, key: str, voter: str) -> str:
    """A pair in the messages format, whatever the prompt is, so that a file has one format."""
    prompt = [{"role": "user", "content": ballot.prompt}] if isinstance(ballot.prompt, str) else list(ballot.prompt)
    answers = {"before": ballot.before, "after": ballot.after}
    chosen, rejected = answers.pop(winner), *answers.values()
    pair = {
        "prompt": prompt, "chosen": chosen, "rejected": rejected,
        "category": ballot.row.category if ballot.row else None,
        "label": {"method": "human", "version": PAGE_VERSION, "time": now(), "key": key, "annotators": [voter]},
    }  # fmt: skip
    line = json.dumps({name: value for name, value in pair.items() if value is not None}, ensure_ascii=False)
    return line.encode("utf-8", "replace").decode() + "\n"  # halves of characters cannot be written
