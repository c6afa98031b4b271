"""One person's way through the answers: what is shown next, in which order, and what each key does."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_dpo.labeling.agreement import agreement_of
from qlora_dpo.labeling.records import Candidates, Record, Verdict, now

PAGE_VERSION = "page 1"


@dataclass(frozen=True, slots=True)
class View:
    """What the page shows; all of it is text."""

    key: str
    """Empty where nothing is left."""
    prompt: str
    answers: tuple[str, ...]
    """In this annotator's order."""
    best: int | None
    """Place of the answer that was called the best, where the worst is still to be named."""
    message: str
    progress: str
    agreement: str


class Annotation:
    """The verdicts of one annotator, given one by one; each is on the disk before the next answers are shown.

    Of two answers one is chosen; of more the best and then the worst.
    """

    def __init__(self, candidates: Sequence[Candidates], record: Record, annotator: str) -> None:
        self._items = {item.key: item for item in candidates}
        self._record, self._annotator = record, annotator
        self._lock = threading.Lock()
        self._best: dict[str, int] = {}
        done = [key for key, name in record.verdicts() if name == annotator]
        self._history = [key for key in done if key in self._items]
        self._queue = deque(key for key in self._items if key not in set(self._history))

    @property
    def longest(self) -> int:
        """The most answers that one prompt has."""
        return max(len(item.answers) for item in self._items.values())

    def act(self, action: str, key: str) -> View:
        """Answer a key press (`1` to `9`, `0` tie, `s` skip, `u` undo) on the page that shows these answers."""
        with self._lock:
            if action == "u":
                return self._view(self._undo())
            if key not in self._items:
                return self._view("These answers are not to be labelled here.")
            if action == "s":
                return self._view(self._skip(key))
            if action == "0":
                self._best.pop(key, None)
                return self._view(self._give(key, None, None))
            return self._view(self._choose(key, int(action) - 1))

    def view(self) -> View:
        """What is shown now."""
        with self._lock:
            return self._view("")

    def _choose(self, key: str, place: int) -> str:
        order = self._order(self._items[key])
        if not 0 <= place < len(order):
            return f"There are {len(order)} answers."
        if len(order) == 2:
            return self._give(key, order[place], order[1 - place])
        best = self._best.get(key)
        if best is None:
            self._best[key] = place
            return f"Answer {place + 1} is the best. Which one is the worst?"
        if best == place:
            return "The worst must be another answer than the best."
        del self._best[key]
        return self._give(key, order[best], order[place])

    def _give(self, key: str, chosen: int | None, rejected: int | None) -> str:
        self._record.add(
            Verdict(
                key=key, chosen=chosen, rejected=rejected, scores=(), confidence=1.0, method="human",
                version=PAGE_VERSION, time=now(), annotator=self._annotator,
                detail={"order": self._order(self._items[key])},
            )
        )  # fmt: skip
        self._forget(key)
        self._history.append(key)
        return ""

    def _skip(self, key: str) -> str:
        self._best.pop(key, None)
        if key in self._queue:
            self._queue.remove(key)
            self._queue.append(key)
        return "Skipped: it comes again at the end."

    def _undo(self) -> str:
        if self._queue and self._best.pop(self._queue[0], None) is not None:
            return "Undone."
        if not self._history:
            return "There is nothing to undo."
        key = self._history[-1]
        self._record.retract(key, self._annotator)
        self._forget(key)
        self._queue.appendleft(key)
        return "Undone: here it is again."

    def _forget(self, key: str) -> None:
        for place in (self._history, self._queue):
            if key in place:
                place.remove(key)

    def _order(self, item: Candidates) -> list[int]:
        """The order of the answers for this annotator: always the same, and no other annotator's."""

        def rank(number: int) -> str:
            return hashlib.sha256(f"{self._annotator}\n{item.key}\n{number}".encode()).hexdigest()

        return sorted(range(len(item.answers)), key=rank)

    def _view(self, message: str) -> View:
        agreement = agreement_of(self._record.verdicts())
        progress = f"{len(self._history):,} of {len(self._items):,} labelled by {self._annotator}"
        shown = {"message": message, "progress": progress, "agreement": str(agreement or "")}
        if not self._queue:
            shown["message"] = f"{message} All done: close the page and press Ctrl-C in the terminal.".strip()
            return View(key="", prompt="", answers=(), best=None, **shown)
        item = self._items[self._queue[0]]
        answers = tuple(item.answers[number] for number in self._order(item))
        return View(key=item.key, prompt=_prompt_text(item), answers=answers, best=self._best.get(item.key), **shown)


def _prompt_text(item: Candidates) -> str:
    if isinstance(item.prompt, str):
        return item.prompt
    if len(item.prompt) == 1:
        return item.prompt[0]["content"]
    return "\n\n".join(f"{message['role']}:\n{message['content']}" for message in item.prompt)
