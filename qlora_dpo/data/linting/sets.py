"""Rules about rows together: the same pair twice, both ways round, on both sides of the split; lengths; truncation."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.linting.duplicates import Signatures, Signer, earliest_similar
from qlora_dpo.data.linting.findings import Rule
from qlora_dpo.data.linting.tokens import IdBatch
from qlora_dpo.data.ragged import Ragged

# Where an answer's length says so much about its label that the model may learn length instead of the preference.
LONGER_SHARE = 0.7  # of the pairs, one side is the longer one
LENGTH_CORRELATION = 0.5
FEWEST_PAIRS = 50
CUT_SHARE = 0.1  # of the answers

Found = Iterator[tuple[int | None, str]]  # row, or None for all of them; detail


@dataclass(frozen=True, slots=True, eq=False)
class PairSketch:
    """What comparisons need to know of every pair; each array has an entry, or a row, per pair."""

    origins: Sequence[str]
    is_held_out: NDArray[np.bool_]
    unit: str
    """What lengths count: tokens or bytes."""
    prompt: NDArray[np.uint64]
    chosen: NDArray[np.uint64]
    rejected: NDArray[np.uint64]
    prompt_signatures: Signatures
    answer_signatures: Signatures
    chosen_lengths: NDArray[np.int64]
    rejected_lengths: NDArray[np.int64]
    cut: NDArray[np.int64]
    """Answers that lost their end; [0] or 1 or 2 each, all 0 without a tokenizer."""

    def __len__(self) -> int:
        return len(self.origins)


class Sketcher:
    """Collects a sketch batch by batch."""

    def __init__(self, prompt_signer: Signer, answer_signer: Signer, end_id: int | None) -> None:
        self._signers = prompt_signer, answer_signer
        self._end_id = end_id
        self._columns: list[tuple[NDArray[np.generic], ...]] = []

    def add(self, batch: IdBatch) -> None:
        """Add pairs."""
        prompt, chosen, rejected = batch
        cut = np.zeros(len(prompt), np.int64)
        if self._end_id is not None:
            cut += (chosen.lasts() != self._end_id).astype(np.int64) + (rejected.lasts() != self._end_id)
        self._columns.append(
            (
                *(ids.hashes() for ids in batch),
                self._signers[0].sign(prompt),
                self._signers[1].sign(both_answers(batch), parts=2),
                chosen.lengths(),
                rejected.lengths(),
                cut,
            )
        )

    def finish(self, origins: Sequence[str], is_held_out: NDArray[np.bool_]) -> PairSketch:
        """The sketch of all pairs that were added."""
        columns: Iterator[NDArray[Any]] = (np.concatenate(column) for column in zip(*self._columns, strict=True))
        return PairSketch(origins, is_held_out, "bytes" if self._end_id is None else "tokens", *columns)


def both_answers(batch: IdBatch) -> Ragged:
    """Chosen and rejected of each pair in turn."""
    return Ragged.of(ids for both in zip(batch[1], batch[2], strict=True) for ids in both)


def _contradictory(pairs: PairSketch) -> Found:
    columns = zip(pairs.prompt.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True)
    seen: dict[Hashable, int] = {}
    for row, (prompt, chosen, rejected) in enumerate(columns):
        other = seen.get((prompt, rejected, chosen))
        if other is not None:
            yield row, f"the same prompt and answers as {pairs.origins[other]}, with the labels the other way round"
        seen.setdefault((prompt, chosen, rejected), row)


def _duplicate(pairs: PairSketch) -> Found:
    for row, first in _repeated(_exact_keys(pairs)):
        yield row, f"the same pair as {pairs.origins[first]}"


def _near_duplicate(pairs: PairSketch) -> Found:
    repeated = {row for row, _ in _repeated(_exact_keys(pairs))}
    found = earliest_similar(
        (pairs.prompt_signatures, pairs.answer_signatures),
        np.arange(len(pairs)),
        apart=pairs.is_held_out.astype(np.int64),
    )
    for row in np.flatnonzero(found >= 0).tolist():
        if row not in repeated:
            yield row, f"nearly the same pair as {pairs.origins[found[row]]}"


def _exact_keys(pairs: PairSketch) -> Iterator[Hashable]:
    columns = (pairs.is_held_out, pairs.prompt, pairs.chosen, pairs.rejected)
    return zip(*(column.tolist() for column in columns), strict=True)


def _repeated(keys: Iterable[Hashable]) -> Iterator[tuple[int, int]]:
    """(row, first row with the same key)."""
    seen: dict[Hashable, int] = {}
    for row, key in enumerate(keys):
        first = seen.setdefault(key, row)
        if first != row:
            yield row, first


def _leaked_answer(pairs: PairSketch) -> Found:
    trained: dict[Hashable, int] = {}
    for row, answers in _answers(pairs, pairs.is_held_out == 0):
        for answer in answers:
            trained.setdefault(answer, row)
    for row, answers in _answers(pairs, pairs.is_held_out):
        first = next((trained[answer] for answer in answers if answer in trained), None)
        if first is not None:
            yield row, f"the prompt with one of the answers is trained on ({pairs.origins[first]})"


def _answers(pairs: PairSketch, of: NDArray[np.bool_]) -> Iterator[tuple[int, tuple[Hashable, Hashable]]]:
    rows = np.flatnonzero(of)
    columns = (column[rows].tolist() for column in (pairs.prompt, pairs.chosen, pairs.rejected))
    for row, prompt, chosen, rejected in zip(rows.tolist(), *columns, strict=True):
        yield row, ((prompt, chosen), (prompt, rejected))


def _leaked_prompt(pairs: PairSketch) -> Found:
    held_out = pairs.is_held_out
    trained = dict(zip(pairs.prompt[~held_out].tolist(), np.flatnonzero(~held_out).tolist(), strict=True))
    leaked = {row for row, _ in _leaked_answer(pairs)}
    for row in np.flatnonzero(held_out).tolist():
        first = trained.get(int(pairs.prompt[row]))
        if first is not None and row not in leaked:
            yield row, f"the prompt is trained on, with other answers ({pairs.origins[first]})"


def _nearly_leaked_prompt(pairs: PairSketch) -> Found:
    held_out = pairs.is_held_out
    if not held_out.any():
        return
    order = np.argsort(held_out, kind="stable")  # what is trained on comes first
    found = earliest_similar((pairs.prompt_signatures,), order)
    for row in np.flatnonzero(held_out & (found >= 0)).tolist():
        first = found[row]
        if not held_out[first] and pairs.prompt[first] != pairs.prompt[row]:
            yield row, f"nearly the prompt of {pairs.origins[first]}, which is trained on"


def length_bias(chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> tuple[float, float]:
    """Share of the pairs with a longer chosen answer (of those that differ), and the correlation of label and length.

    Each pair counts as two answers, one labelled +1 and one -1, each with its length minus the other's; by symmetry
    both means are 0, and the correlation is the mean difference over its root mean square.
    """
    difference = (chosen - rejected).astype(np.float64)
    different = difference[difference != 0]
    if not len(different):
        return 0.5, 0.0
    share = float((different > 0).mean())
    return share, float(difference.mean() / np.sqrt((difference**2).mean()))


def _length_bias(pairs: PairSketch) -> Found:
    share, correlation = length_bias(pairs.chosen_lengths, pairs.rejected_lengths)
    is_one_sided = max(share, 1 - share) > LONGER_SHARE or abs(correlation) > LENGTH_CORRELATION
    if len(pairs) >= FEWEST_PAIRS and is_one_sided:
        means = f"{pairs.chosen_lengths.mean():.0f} and {pairs.rejected_lengths.mean():.0f} {pairs.unit}"
        correlates = f"correlation of length and label {correlation:+.2f}; means {means}"
        yield None, f"chosen is the longer answer in {share:.0%} of the pairs ({correlates})"


def _many_cut(pairs: PairSketch) -> Found:
    share = float(pairs.cut.sum()) / max(1, 2 * len(pairs))
    if share > CUT_SHARE:
        yield None, f"{share:.0%} of the answers lose their end, and the end token with it"


SetCheck = Callable[[PairSketch], Found]

SET_RULES: tuple[Rule[SetCheck], ...] = (
    Rule(
        "contradictory",
        "error",
        "A preferred to B and B preferred to A for one prompt",
        "Remove the wrong one, or both: they cancel each other out.",
        _contradictory,
        tolerated=0.01,
    ),
    Rule("duplicate", "warning", "the same pair twice", "Remove one, or it counts double.", _duplicate),
    Rule(
        "near_duplicate",
        "warning",
        "pairs whose prompts and answers are at least 80% the same (MinHash, estimated)",
        "Keep one of them.",
        _near_duplicate,
    ),
    Rule(
        "leaked_answer",
        "error",
        "held-out pairs whose prompt and one of its answers are trained on",
        "Remove them from one side: the evaluation would measure what was learned by heart.",
        _leaked_answer,
        tolerated=0.01,
        of_held_out=True,
    ),
    Rule(
        "leaked_prompt",
        "warning",
        "held-out prompts that are trained on with other answers",
        "Remove them from one side; without --eval_dataset the split is by prompt.",
        _leaked_prompt,
    ),
    Rule(
        "nearly_leaked_prompt",
        "warning",
        "held-out prompts at least 80% the same as one that is trained on (MinHash, estimated)",
        "Remove them from one side, or take the held-out numbers for better than they are.",
        _nearly_leaked_prompt,
    ),
    Rule(
        "length_bias",
        "warning",
        f"whether the longer answer is the chosen (or the rejected) one in more than {LONGER_SHARE:.0%} of the pairs, "
        f"or length and label correlate by more than {LENGTH_CORRELATION}; from {FEWEST_PAIRS} pairs on",
        "Balance the lengths, or counter it with --loss_type sigmoid_norm or --ld_alpha 0.5; compare lengths after.",
        _length_bias,
    ),
    Rule(
        "many_cut",
        "warning",
        f"whether more than {CUT_SHARE:.0%} of the answers are cut at --max_length",
        "Raise --max_length: cut answers teach nothing about how an answer ends.",
        _many_cut,
    ),
)
