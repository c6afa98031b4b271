"""What a comparison leaves on the disk: both answers to each prompt, verdicts about them, and what they come to.

A comparison is a folder. `answers.jsonl` has the settings in its first line and then a row per prompt, `verdicts.jsonl`
a row per prompt and method, `summary.json` the numbers. The first two only grow, and survive a kill.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import DataError, StorageError, UsageError
from qlora_dpo.files.guard import check_output, json_with, refuse_inputs
from qlora_dpo.labeling.record_file import RecordFile, read_lines
from qlora_dpo.training.folder.run_folder import write_atomically

ANSWERS, VERDICTS, SUMMARY = "answers.jsonl", "verdicts.jsonl", "summary.json"
FOLDER = "compare"  # of a run
IS_SUMMARY = json_with("settings", "prompts", "verdicts", "rates")

# Settings that are kept to be read: another version, or another name of the same weights, goes on with a comparison.
DISPLAYED = {"versions", "model", "adapter", "prompts", "device"}

Winner = Literal["before", "after", "tie"]
WINNERS: tuple[Winner, ...] = ("before", "after", "tie")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of one model, and how likely both models find it."""

    text: str
    tokens: int
    """With the end token, where the model ended it."""
    finish_reason: Literal["stop", "length"]
    logp: float
    """Of the whole answer, under the model that wrote it."""
    logp_per_token: float
    logp_policy: float
    """With the adapter."""
    logp_reference: float
    """Without it."""
    reward: float
    """beta * (logp_policy - logp_reference)."""
    seconds: float
    """Its share of the time that its batch took."""


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer that the policy drew at temperature 1, to measure how far it went from the reference."""

    tokens: int
    finish_reason: Literal["stop", "length"]
    logp_policy: float
    logp_reference: float


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt with the answers before (adapter off) and after (adapter on)."""

    id: str
    """16 hex digits of the prompt, its seed and the settings."""
    prompt: str | tuple[Message, ...]
    category: str | None
    reference_answer: str | None
    origin: str
    """`file:line`."""
    seed: int
    before: Answer
    after: Answer
    fact: str | None = None
    """What a right answer contains."""
    sample: Sample | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which of the two answers is better, by one method; `scores` are [before, after]."""

    id: str
    method: str
    winner: Winner
    scores: tuple[float, float] | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    version: str = ""
    """Of what decided: a verdict of another version is made again."""
    time: str = ""
    annotator: str | None = None


class AnswerFile:
    """The answers of a comparison that may go on: what a kill tore is cut off, all whole rows are kept.

    Raises:
        DataError: the file holds something else.
        UsageError: it holds answers that were made with other settings.
        StorageError: it cannot be read or written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.path = folder / ANSWERS
        self._settings = settings
        self._lines = RecordFile(self.path, b'{"settings": ', _settings_of)
        lines = self._lines.new()
        if lines:
            self.began_with = _settings_of(*lines[0])
            _refuse_other(self.path, self.began_with, settings)
        else:
            self.began_with = settings
            self._lines.append(_line({"settings": settings}))
        self.rows = {row.id: row for origin, line in lines[1:] for row in [_row_of(origin, line)]}

    def add(self, *rows: Row) -> None:
        """Keep rows; when this returns they are on the disk."""
        self._lines.append("".join(_line(_as_json(row)) for row in rows))
        self.rows |= {row.id: row for row in rows}

    def finish(self, order: Sequence[str]) -> list[Row]:
        """The rows with these ids, in this order, which the file has then too."""
        rows = [self.rows[id_] for id_ in order if id_ in self.rows]
        if [row.id for row in rows] != list(self.rows):
            text = _line({"settings": self.began_with}) + "".join(_line(_as_json(row)) for row in rows)
            _write(self.path, text)
        return rows


class VerdictFile:
    """The verdicts of a comparison; the last of an id, a method and an annotator counts.

    Raises:
        DataError: a line of it is no verdict.
        StorageError: it cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._lines = RecordFile(folder / VERDICTS, b'{"id": ', partial(_count, {}))
        self._verdicts: dict[tuple[str, str, str | None], Verdict] = {}

    def add(self, *verdicts: Verdict) -> None:
        """Keep verdicts; when this returns they are on the disk."""
        self._lines.append("".join(_line(_as_json(verdict)) for verdict in verdicts))

    def verdicts(self) -> list[Verdict]:
        """All that count, those of other processes included."""
        for origin, line in self._lines.new():
            _count(self._verdicts, origin, line)
        return list(self._verdicts.values())


def read_answers(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """Settings and rows of a comparison, which may still be going on; nothing is changed.

    Raises:
        DataError: the file holds something else.
        StorageError: it cannot be read.
    """
    lines = read_lines(folder / ANSWERS)
    if not lines:
        raise DataError(f"{folder / ANSWERS} is empty. Run `python -m eval compare` again.")
    return _settings_of(*lines[0]), [_row_of(origin, line) for origin, line in lines[1:]]


def read_verdicts(folder: Path) -> list[Verdict]:
    """The verdicts of a comparison that count; none where there is no file.

    Raises:
        DataError: a line is no verdict.
        StorageError: the file cannot be read.
    """
    verdicts: dict[tuple[str, str, str | None], Verdict] = {}
    if (folder / VERDICTS).is_file():
        for origin, line in read_lines(folder / VERDICTS):
            _count(verdicts, origin, line)
    return list(verdicts.values())


def read_summary(folder: Path) -> dict[str, Any]:
    """The numbers of a comparison.

    Raises:
        DataError: the file holds something else.
        StorageError: it cannot be read: the comparison has not finished.
    """
    file = folder / SUMMARY
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        why = "has not finished: run it again" if (folder / ANSWERS).is_file() else "is not there: check the path"
        raise StorageError(f"{file} cannot be read: the comparison {why} (`python -m eval compare`).") from error
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror or error}; check the path.") from error
    except ValueError as error:
        raise DataError(f"{file} is no JSON ({error}). Run `python -m eval compare` again.") from error
    if not isinstance(summary, dict):
        raise DataError(f"{file} holds no summary of a comparison. Run `python -m eval compare` again.")
    return summary


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Replace the numbers of a comparison.

    Raises:
        StorageError: the disk refuses; the file is as it was.
    """
    text = json.dumps(summary, ensure_ascii=False, indent=1, allow_nan=False)
    _write(folder / SUMMARY, text + "\n")


def check_folder(folder: Path, inputs: Sequence[str]) -> None:
    """Refuse a folder whose files would be an input, or are there and not those of a comparison.

    Raises:
        DataError, UsageError: naming the file.
    """
    check_output(folder / SUMMARY, inputs=inputs, is_own=IS_SUMMARY, option=None)
    for name in (ANSWERS, VERDICTS):
        refuse_inputs(folder / name, inputs, str(folder / name))
    if (folder / VERDICTS).exists():
        VerdictFile(folder)


def _settings_of(origin: str, line: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(line)["settings"]
        if isinstance(settings, dict):
            return settings
    except (ValueError, KeyError, TypeError):
        pass
    raise DataError(f"{origin}: not the settings of a comparison, so this file is something else. Name another folder.")


def _refuse_other(path: Path, began_with: dict[str, Any], settings: dict[str, Any]) -> None:
    now = json.loads(json.dumps(settings))
    names = sorted((began_with.keys() | now.keys()) - DISPLAYED)
    other = [
        f"{name} {began_with.get(name)}, now {now.get(name)}" for name in names if began_with.get(name) != now.get(name)
    ]
    if other:
        raise UsageError(
            f"{path} was begun with {'; '.join(other)}. Repeat the command that began it, or name another --output."
        )


def _row_of(origin: str, line: bytes) -> Row:
    try:
        values = json.loads(line)
        prompt, sample = values["prompt"], values.get("sample")
        known = {one.name: values[one.name] for one in fields(Row) if one.name in values}
        return Row(
            **known
            | {
                "prompt": prompt if isinstance(prompt, str) else tuple(prompt),
                "before": Answer(**values["before"]),
                "after": Answer(**values["after"]),
                "sample": None if sample is None else Sample(**sample),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{origin}: not a row of a comparison ({error}). Remove this line, or compare anew.") from error


def _count(verdicts: dict[tuple[str, str, str | None], Verdict], origin: str, line: bytes) -> None:
    try:
        values = json.loads(line)
        known = {one.name: values[one.name] for one in fields(Verdict) if one.name in values}
        scores = known.get("scores")
        verdict = Verdict(**known | {"scores": None if scores is None else (float(scores[0]), float(scores[1]))})
        if verdict.winner not in WINNERS:
            raise ValueError(f"winner {verdict.winner!r}")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{origin}: not a verdict ({error}). Remove this line.") from error
    verdicts[verdict.id, verdict.method, verdict.annotator] = verdict


def _as_json(record: Row | Verdict) -> dict[str, Any]:
    values = asdict(record)
    return {
        name: value for name, value in values.items() if not (name in {"fact", "sample", "annotator"} and value is None)
    }


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}. Make room there and run the same command again."
        ) from error
