"""Runs the rules of `data lint` over pairs: over their text, their token ids, and all of them together.

Without a tokenizer the rules about tokens are left out, and pairs are compared by the bytes of their text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.data.linting.duplicates import BYTES, TOKENS, Signer
from qlora_dpo.data.linting.findings import Finding, Rule
from qlora_dpo.data.linting.report import LintReport
from qlora_dpo.data.linting.rows import BadRows, refused_rows, unread_columns
from qlora_dpo.data.linting.sets import SET_RULES, PairSketch, Sketcher, both_answers
from qlora_dpo.data.linting.texts import TEXT_RULES, Marks, find_marks
from qlora_dpo.data.linting.tokens import BATCH_RULES, SAMPLE_RULES, SAMPLED, TEMPLATE_RULES, IdBatch, TokenFacts
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import PreferencePair, RefusedRow
from qlora_dpo.data.progress import with_progress
from qlora_dpo.data.ragged import Ragged
from qlora_dpo.errors import DataError

# Raise it when a rule finds something else in the same rows: `train` then looks again.
LINT_VERSION = 2

_BATCH = 1000  # pairs
_LONGEST_SAMPLED = 1_000_000  # characters of an answer: a longer one takes seconds to tokenize again
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LintSource:
    """Pairs of one source: as arrays in batches, and again as text."""

    origins: list[str]
    batches: list[IdBatch]
    texts: Iterable[PreferencePair | RefusedRow]
    refused: Sequence[RefusedRow] = ()
    unread_columns: Sequence[str] = ()
    """Columns that its rows have and nobody reads."""
    name: str = ""
    pairs: PairDataset | None = None
    """The same as token ids, where there is a tokenizer."""


def tokenized_source(dataset: PairDataset) -> LintSource:
    """The pairs of a tokenized source."""
    batches = list(dataset.id_batches())
    report = dataset.report
    return LintSource(
        dataset.origins(), batches, dataset.texts, report.refused, report.unread_columns, report.source, dataset
    )


def text_source(reader: PairReader) -> LintSource:
    """The pairs of a source that is read without a tokenizer; their bytes stand for token ids."""
    refused: list[RefusedRow] = []
    origins: list[str] = []
    batches: list[IdBatch] = []
    rows = with_progress(reader, "reading", None)
    while part := list(islice(rows, _BATCH)):
        refused += [row for row in part if isinstance(row, RefusedRow)]
        pairs = [row for row in part if isinstance(row, PreferencePair)]
        origins += [pair.origin for pair in pairs]
        prompts = ["\n".join(f"{turn['role']}: {turn['content']}" for turn in pair.messages) for pair in pairs]
        columns = (prompts, [pair.chosen for pair in pairs], [pair.rejected for pair in pairs])
        prompt, chosen, rejected = (Ragged.of(_bytes(text) for text in column) for column in columns)
        batches.append((prompt, chosen, rejected))
    return LintSource(origins, batches, reader, refused, reader.unread.names, reader.source.name)


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8)


def lint_pairs(
    sources: Sequence[LintSource],
    *,
    train: Sequence[int] | None = None,
    held_out: Sequence[int] = (),
    facts: TokenFacts | None = None,
    bad_rows: BadRows = "fail",
) -> LintReport:
    """Apply every rule that can be applied to the pairs at these places of all sources; by default all are trained on.

    `facts` are those of the tokenizer, where the sources are tokenized.

    Raises:
        DataError: a source changed while it was read.
    """
    job = _Linting(sources, train, held_out, facts)
    for source in sources:
        job.report.add(refused_rows(source.refused, bad_rows))
        if bad_rows != "known":
            job.report.add(unread_columns(source.name, source.unread_columns))
    job.check_template()
    job.check_texts()
    job.check_ids()
    return job.report


class _Linting:
    """One run of all rules: which pairs are looked at, and what was found."""

    def __init__(
        self,
        sources: Sequence[LintSource],
        train: Sequence[int] | None,
        held_out: Sequence[int],
        facts: TokenFacts | None,
    ) -> None:
        self.sources, self.facts = sources, facts
        self.origins = list(chain.from_iterable(source.origins for source in sources))
        side = np.full(len(self.origins), -1)
        side[slice(None) if train is None else np.asarray(train, np.int64)] = 0
        side[np.asarray(held_out, np.int64)] = 1
        self.places: Places = np.flatnonzero(side >= 0)
        self.is_held_out = side[self.places] == 1
        self.report = LintReport(len(self.places), int(self.is_held_out.sum()), has_tokens=facts is not None)
        count = min(len(self.places), SAMPLED)
        self.sampled = set(self.places[np.linspace(0, len(self.places) - 1, count).astype(np.int64)].tolist())

    def check_template(self) -> None:
        """Apply the rules about the chat template."""
        for rule in TEMPLATE_RULES if self.facts else ():
            assert self.facts is not None
            detail = rule.check(self.facts)
            self._add(rule, [] if detail is None else [(None, detail)], ())

    def check_texts(self) -> None:
        """Apply the rules about a row's text, and to some rows those about its way to ids."""
        marks = find_marks(self.facts.control_texts if self.facts else ())
        start = 0
        for source in self.sources:
            sample: list[tuple[int, PreferencePair]] = []
            end = start + len(source.origins)
            wanted = self.places[(self.places >= start) & (self.places < end)] - start
            for place, pair in with_progress(_wanted_texts(source, wanted), "checking text", len(wanted)):
                self._check_text(pair, marks)
                if start + place in self.sampled and max(len(pair.chosen), len(pair.rejected)) <= _LONGEST_SAMPLED:
                    sample.append((place, pair))
            if self.facts is not None and source.pairs is not None:
                self._check_sample(source.pairs, sample, self.facts)
            start = end

    def _check_text(self, pair: PreferencePair, marks: Marks) -> None:
        for rule in TEXT_RULES:
            detail = rule.check(pair, marks)
            if detail is not None:
                self.report.add([Finding(pair.origin, rule.name, detail)])

    def _check_sample(
        self, dataset: PairDataset, sample: Sequence[tuple[int, PreferencePair]], facts: TokenFacts
    ) -> None:
        for start in range(0, len(sample), _BATCH):
            part = sample[start : start + _BATCH]
            texts, pairs = [pair for _, pair in part], [dataset[place] for place, _ in part]
            for rule in SAMPLE_RULES:
                self._add(rule, rule.check(texts, pairs, facts), [pair.origin for pair in texts])

    def check_ids(self) -> None:
        """Apply the rules about token ids, and those about all pairs together."""
        batches = list(self._wanted_batches())
        if not batches:
            return
        grain = TOKENS if self.facts else BYTES
        few = batches[:: max(1, len(batches) // 100)]
        signers = (
            Signer(grain, [batch[0] for _, batch in few]), Signer(grain, [both_answers(batch) for _, batch in few])
        )  # fmt: skip
        sketcher = Sketcher(*signers, end_id=self.facts.end_id if self.facts else None)
        origins = [self.origins[place] for place in self.places.tolist()]
        start = 0
        for number, batch in with_progress(batches, "comparing", len(batches), unit=f" x {_BATCH} rows"):
            sketcher.add(batch)
            for rule in BATCH_RULES if self.facts else ():
                assert self.facts is not None
                self._add(rule, rule.check(batch, self.facts), origins[start : start + number])
            start += number
        self._check_sketch(sketcher.finish(origins, self.is_held_out))

    def _check_sketch(self, sketch: PairSketch) -> None:
        for rule in SET_RULES:
            self._add(rule, rule.check(sketch), sketch.origins)

    def _wanted_batches(self) -> Iterator[tuple[int, IdBatch]]:
        """The pairs to look at, in batches: how many, and their arrays."""
        start = 0
        for batch in chain.from_iterable(source.batches for source in self.sources):
            count = len(batch[0])
            first, last = np.searchsorted(self.places, [start, start + count])
            rows = self.places[first:last] - start
            if len(rows):
                prompt, chosen, rejected = (ids.take(rows) for ids in batch)
                yield len(rows), (prompt, chosen, rejected)
            start += count

    def _add(self, rule: Rule[Any], found: Iterable[tuple[int | None, str]], origins: Sequence[str]) -> None:
        """Take in what a rule found, one finding for a row that it says several things about."""
        of_row: dict[int | None, list[str]] = {}
        for row, detail in found:
            of_row.setdefault(row, []).append(detail)
        self.report.add(
            Finding("all rows" if row is None else origins[row], rule.name, "; ".join(details))
            for row, details in of_row.items()
        )


def _wanted_texts(source: LintSource, wanted: Places) -> Iterator[tuple[int, PreferencePair]]:
    """The wanted pairs of a source as text, with their places among its pairs."""
    left = iter(wanted.tolist())
    next_wanted = next(left, None)
    place = 0
    for pair in source.texts:
        if next_wanted is None:
            return
        # A row that only the tokenizer refused is read here again, and is no pair.
        if not isinstance(pair, PreferencePair) or pair.origin != source.origins[place]:
            continue
        if place == next_wanted:
            yield place, pair
            next_wanted = next(left, None)
        place += 1
        if place == len(source.origins):
            break
    if next_wanted is not None:
        raise DataError(
            f"{source.origins[next_wanted]} is gone: the file changed meanwhile. Run the same command again."
        )


def kept_texts(source: LintSource) -> Iterator[tuple[int, PreferencePair]]:
    """All pairs of a source as text, with their places. Raises: DataError where the file changed meanwhile."""
    return _wanted_texts(source, np.arange(len(source.origins)))
