"""Sets of answers to compare: rows of `generate`, or pairs whose order is hidden."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qlora_dpo.data.files.readers import Row, Rows, settled_format
from qlora_dpo.data.files.sources import read_rows
from qlora_dpo.data.formats import ColumnNames, detect_format, parse_row
from qlora_dpo.data.preferences import Message, ParsedPair, RefusedRow, RowError
from qlora_dpo.labeling.refused import report_refused

NOTHING_TO_COMPARE = "fewer than two different answers that are not empty"


@dataclass(frozen=True, slots=True)
class Candidates:
    """One prompt with two or more different answers to compare."""

    prompt: str | tuple[Message, ...]
    answers: tuple[str, ...]
    category: str | None = None
    reference_answer: str | None = None
    origin: str = ""

    @property
    def key(self) -> str:
        """32 hexadecimal digits that stand for the prompt and the answers in their order."""
        return _hash(self.prompt, self.answers)


def read_candidates(
    source: str,
    *,
    split: str | None = None,
    dataset_format: str = "auto",
    names: ColumnNames | None = None,
    seed: int = 0,
) -> Iterator[Candidates | RefusedRow]:
    """Yield the sets of answers of a source: rows of `generate`, or pairs of any known format.

    Answers that a row repeats count once, empty ones not at all. The two answers of a pair come in an order that a
    seeded hash decides, so that no labeller can know which one was chosen.

    Raises:
        DataError, StorageError, UsageError: as `read_rows` and `detect_format`.
    """
    names = names or ColumnNames()
    rows = read_rows(source, split=split)
    if dataset_format == "auto":
        dataset_format, rows = format_of(rows, names)
    for row in rows:
        if isinstance(row, RefusedRow):
            yield row
            continue
        try:
            yield _candidates_of(row, dataset_format, names, seed)
        except RowError as error:
            yield error.refused(row.origin)


def load_candidates(source: str, bad_rows: Literal["fail", "skip"] = "fail") -> list[Candidates]:
    """All sets of answers of a source; rows that are none are counted on the terminal where they may be skipped.

    A row whose answers are all the same, as a model gives them that is sure of itself, is no bad row: it is counted.

    Raises:
        DataError: naming the bad rows, unless they are to be skipped; or there is nothing to label.
    """
    candidates: list[Candidates] = []
    refused: list[RefusedRow] = []
    for row in read_candidates(source):
        refused.append(row) if isinstance(row, RefusedRow) else candidates.append(row)
    bad = [row for row in refused if not row.reason.startswith(NOTHING_TO_COMPARE)]
    report_refused(source, bad if candidates else refused, len(candidates), bad_rows)
    same = len(refused) - len(bad)
    if same:
        print(f"{source}: {same:,} rows are left out, whose answers are all the same or empty.")
    return candidates


def blind_candidates(parsed: ParsedPair, reference_answer: str | None = None, seed: int = 0) -> Candidates:
    """The answers of a row of pairs in an order that does not tell which one was chosen."""
    pair = parsed.pair
    answers = sorted({text for one in (pair, *parsed.more) for text in (one.chosen, one.rejected)})
    if int(_hash(pair.prompt, answers, seed), 16) % 2:
        answers.reverse()
    return Candidates(pair.prompt, tuple(answers), pair.category, reference_answer, pair.origin)


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def format_of(rows: Rows, names: ColumnNames) -> tuple[str, Rows]:
    """The format of the rows that have no `answers`, by the first row that shows it, and all rows."""
    found, rows = settled_format(rows, lambda values: None if "answers" in values else detect_format(values, names))
    return found or "messages", rows  # which reads a row of `generate` whether its prompt is text or messages


def _candidates_of(row: Row, dataset_format: str, names: ColumnNames, seed: int) -> Candidates:
    values = row.values
    reference = values.get("reference_answer")
    if reference is not None and not isinstance(reference, str):
        raise RowError("reference_answer", f"must be text (it is {type(reference).__name__})")
    if "answers" not in values:
        return blind_candidates(parse_row(dataset_format, values, names, row.origin), reference or None, seed)
    answers = _different_answers(values["answers"])
    form = "plaintext" if isinstance(values.get(names.prompt), str) else "messages"
    as_pair = {**values, names.chosen: answers[0], names.rejected: answers[1]}
    pair = parse_row(form, as_pair, names, row.origin).pair
    return Candidates(pair.prompt, answers, pair.category, reference or None, row.origin)


def _different_answers(values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise RowError("answers", f"must be a list of texts (it is {type(values).__name__})")
    for number, answer in enumerate(values):
        if not isinstance(answer, str):
            raise RowError(f"answers[{number}]", f"must be text (it is {type(answer).__name__})")
        try:
            answer.encode()
        except UnicodeEncodeError:
            raise RowError(f"answers[{number}]", "holds half of a surrogate pair, which is no character") from None
    different = tuple(dict.fromkeys(answer for answer in values if answer.strip()))
    if len(different) < 2:
        raise RowError("answers", f"{NOTHING_TO_COMPARE} (there are {len(values)})")
    return different
