"""What every labeller reads and writes: sets of answers to compare, verdicts about them, pairs to train on.

Verdicts go one by one into a record beside the output, which only grows; a labelling run that was killed goes on
behind the last of them. The output is written from the record, as often as one likes.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from qlora_dpo.errors import DataError, StorageError, UsageError
from qlora_dpo.files.guard import check_output, lines_with, refuse_inputs
from qlora_dpo.labeling.candidates import Candidates, load_candidates, read_candidates
from qlora_dpo.labeling.record_file import RecordFile, read_lines
from qlora_dpo.training.folder.run_folder import write_atomically

__all__ = [
    "Candidates", "Record", "Summary", "Verdict", "Verdicts", "finish", "load_candidates", "majority", "now",
    "open_record", "pending", "read_candidates", "read_verdicts", "record_path",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which answer is better, which is worse, and who says so; both are None where they tie."""

    key: str
    chosen: int | None
    rejected: int | None
    scores: tuple[float, ...]
    """One per answer, or empty."""
    confidence: float
    method: str
    """rules, reward_model, judge, human or reference."""
    version: str
    """Of what decided: a verdict of another version is made again."""
    time: str
    annotator: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.chosen is None) != (self.rejected is None) or (self.chosen == self.rejected is not None):
            raise ValueError(f"chosen {self.chosen} and rejected {self.rejected} are neither two answers nor a tie")
        if not 0 < self.confidence <= 1:
            raise ValueError(f"confidence {self.confidence} is not above 0 and at most 1")

    @property
    def is_tie(self) -> bool:
        """Neither answer is better."""
        return self.chosen is None


Verdicts = dict[tuple[str, str | None], Verdict]


@dataclass(frozen=True, slots=True)
class Summary:
    """What became of all sets of answers: always `candidates == pairs + ties + unlabelled`."""

    output: Path
    candidates: int
    pairs: int
    ties: int
    unlabelled: int
    categories: Mapping[str, int]
    """Pairs by category, where there are categories."""

    def __str__(self) -> str:
        parts = [f"{self.pairs:,} pairs", f"{self.ties:,} ties"]
        if self.unlabelled:
            parts.append(f"{self.unlabelled:,} without a verdict")
        text = f"{self.output}: {', '.join(parts)} of {self.candidates:,} sets of answers"
        by_category = ", ".join(f"{name} {count:,}" for name, count in sorted(self.categories.items()))
        return f"{text}\n  pairs by category: {by_category}" if by_category else text


class Record:
    """The verdicts of one labelling, on disk line by line; several processes may add to it at once.

    Raises:
        DataError: a line of it is no verdict.
        StorageError: it cannot be opened or written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._verdicts: Verdicts = {}
        self._lines = RecordFile(file, b'{"key": ', partial(_apply, {}))
        self.verdicts()

    def add(self, *verdicts: Verdict) -> None:
        """Append verdicts; when this returns they are on the disk."""
        self._append([asdict(verdict) for verdict in verdicts])

    def retract(self, key: str, annotator: str | None = None) -> None:
        """Take a verdict back: the record keeps it, and that it no longer counts."""
        self._append([{"retracted": key, "annotator": annotator, "time": now()}])

    def verdicts(self) -> Verdicts:
        """The verdicts that count, by key and annotator, those of other processes included; the last one wins."""
        for origin, line in self._lines.new():
            _apply(self._verdicts, origin, line)
        return dict(self._verdicts)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        self._lines.append("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def record_path(output: Path) -> Path:
    """pairs.jsonl has its record in pairs.labels.jsonl."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.labels.jsonl")


def open_record(output: Path, method: str, source: str) -> Record:
    """The record beside an output file, which one method of labelling fills; `source` is what is labelled.

    Raises:
        DataError: what is there under the name of the record is something else.
        UsageError: the output is no .jsonl file, is the source, or is there and holds something else than labelled
            pairs; or another method has filled its record.
    """
    if output.suffix != ".jsonl":
        raise UsageError(f"--output {output}: pairs are written as JSON Lines, so its name must end with .jsonl.")
    check_output(output, inputs=[source], is_own=lines_with(_is_labelled))
    refuse_inputs(record_path(output), [source], str(record_path(output)))
    record = Record(record_path(output))
    others = {verdict.method for verdict in record.verdicts().values()} - {method}
    if others:
        raise UsageError(
            f"{record.file} holds verdicts by {', '.join(sorted(others))}, and a record is of one method; name another "
            "--output, then compare both with `data compare-labels`."
        )
    return record


def read_verdicts(file: Path) -> Verdicts:
    """The verdicts of a record that is not to be written to."""
    verdicts: Verdicts = {}
    for origin, line in read_lines(file):
        _apply(verdicts, origin, line)
    return verdicts


def pending(
    candidates: Iterable[Candidates], verdicts: Verdicts, *, version: str | None = None, annotator: str | None = None
) -> list[Candidates]:
    """The sets of answers, each once, without a verdict of this version (any, where none is given)."""
    left: dict[str, Candidates] = {}
    for item in candidates:
        key = item.key
        verdict = verdicts.get((key, annotator))
        if verdict is None or version not in (None, verdict.version):
            left.setdefault(key, item)
    return list(left.values())


def majority(verdicts: Sequence[Verdict]) -> Verdict:
    """What more than half of the annotators say, with their share as confidence; a tie where no such half is."""
    if len(verdicts) == 1:
        return verdicts[0]
    votes = Counter((verdict.chosen, verdict.rejected) for verdict in verdicts)
    (chosen, rejected), count = votes.most_common(1)[0]
    if 2 * count <= len(verdicts):
        chosen = rejected = None
    latest = max(verdicts, key=lambda verdict: verdict.time)
    return replace(
        latest, chosen=chosen, rejected=rejected, confidence=count / len(verdicts), scores=(), annotator=None,
        detail={"annotators": sorted(verdict.annotator or "" for verdict in verdicts)},
    )  # fmt: skip


def finish(output: Path, candidates: Sequence[Candidates], verdicts: Verdicts) -> Summary:
    """Write the decided sets of answers as pairs to train on; ties and verdicts about other answers stay in the record.

    Raises:
        StorageError: the disk refuses; the file is as it was.
    """
    by_key: dict[str, list[Verdict]] = defaultdict(list)
    for (key, _), verdict in verdicts.items():
        by_key[key].append(verdict)
    decided = [(item, majority(found)) for item in candidates if (found := by_key.get(item.key))]
    pairs = [(item, verdict) for item, verdict in decided if not verdict.is_tie]
    # A file has one format: where some prompts are messages, a text is written as one user message.
    as_messages = any(not isinstance(item.prompt, str) for item, _ in pairs)
    rows = [_pair_row(item, verdict, as_messages) for item, verdict in pairs]
    try:
        write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise StorageError(
            f"{output} cannot be written: {error.strerror or error}. All verdicts are in {record_path(output)}; make "
            "room and run the same command again."
        ) from error
    return Summary(
        output=output,
        candidates=len(candidates),
        pairs=len(pairs),
        ties=len(decided) - len(pairs),
        unlabelled=len(candidates) - len(decided),
        categories=Counter(item.category for item, _ in pairs if item.category is not None),
    )


def now() -> str:
    """The time as records have it: ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _apply(verdicts: Verdicts, origin: str, line: bytes) -> None:
    try:
        row = json.loads(line)
        if "retracted" in row:
            verdicts.pop((row["retracted"], row["annotator"]), None)
            return
        verdict = Verdict(**row | {"scores": tuple(row["scores"])})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{origin}: not a verdict ({error}); remove this line, or start with another output."
        ) from error
    verdicts[verdict.key, verdict.annotator] = verdict


def refuse_unlabelled(origin: str, line: bytes) -> None:
    """Refuse a line that is no pair of a labeller's.

    Raises:
        DataError: naming it.
    """
    try:
        is_own = _is_labelled(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_own = False
    if not is_own:
        raise DataError(f"{origin}: not a labelled pair, so this file is something else. Move it away.")


def _is_labelled(row: Mapping[str, Any]) -> bool:
    """Whether a row says who labelled it, as a labeller's pairs do."""
    return bool(row["label"].keys() >= {"method", "version", "time", "key"})


def _pair_row(item: Candidates, verdict: Verdict, as_messages: bool) -> dict[str, Any]:
    assert verdict.chosen is not None and verdict.rejected is not None
    prompt = item.prompt
    if as_messages:
        prompt = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    row = {
        "prompt": prompt,
        "chosen": item.answers[verdict.chosen],
        "rejected": item.answers[verdict.rejected],
        "category": item.category,
        "confidence": verdict.confidence,
        "label": {
            "method": verdict.method,
            "version": verdict.version,
            "time": verdict.time,
            "key": verdict.key,
            "chosen": verdict.chosen,
            "rejected": verdict.rejected,
            "scores": verdict.scores,
            "annotators": verdict.detail.get("annotators", [verdict.annotator] if verdict.annotator else []),
            "origin": item.origin,
        },
    }
    return {name: value for name, value in row.items() if value is not None}
