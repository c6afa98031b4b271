"""The file that `generate` fills: a row per prompt, kept as soon as its answers are there, in the prompts' order at the
end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dpo.errors import DataError, StorageError, UsageError
from qlora_dpo.labeling.prompts import PromptRow
from qlora_dpo.labeling.record_file import RecordFile
from qlora_dpo.training.folder.run_folder import write_atomically

Answers = list[tuple[str, str]]
"""(text, finish reason) of each candidate."""


class AnswerFile:
    """The answers so far; a row that a kill tore is cut off, all whole ones are kept.

    Raises:
        DataError: the file holds something else.
        UsageError: it holds answers to other prompts, or made in another way.
        StorageError: it cannot be read or written.
    """

    def __init__(self, file: Path, prompts: Sequence[PromptRow], settings: dict[str, Any], n: int) -> None:
        if file.suffix != ".jsonl":
            raise UsageError(f"--output {file}: answers are written as JSON Lines, so its name must end with .jsonl.")
        self.file = file
        self._prompts = {prompt.number: prompt for prompt in prompts}
        self._settings, self._n = settings, n
        self._lines = RecordFile(file, b'{"prompt": ', _refuse_foreign)
        self.rows: dict[int, dict[str, Any]] = {}
        for origin, line in self._lines.new():
            number, row = self._read(origin, line)
            self.rows[number] = row
        self._is_ordered = list(self.rows) == sorted(self.rows)

    def add(self, number: int, answers: Answers) -> None:
        """Keep the answers to a prompt; when this returns they are on the disk."""
        prompt = self._prompts[number]
        row: dict[str, Any] = {
            "prompt": prompt.prompt,
            "answers": [text for text, _ in answers],
            "category": prompt.category,
            "reference_answer": prompt.reference_answer,
            "origin": prompt.origin,
            "generation": {**self._settings, "row": number, "finish_reasons": [reason for _, reason in answers]},
        }
        row = {name: value for name, value in row.items() if value is not None}
        self._lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        self._is_ordered &= number >= max(self.rows, default=-1)
        self.rows[number] = row

    def finish(self) -> None:
        """Put the rows into the order of the prompts."""
        if self._is_ordered:
            return
        lines = [json.dumps(self.rows[number], ensure_ascii=False) + "\n" for number in sorted(self.rows)]
        try:
            write_atomically(self.file, "".join(lines))
        except OSError as error:
            raise StorageError(
                f"{self.file} cannot be put in order: {error.strerror or error}. All answers are in it: make room and "
                "run the same command again."
            ) from error

    def _read(self, origin: str, line: bytes) -> tuple[int, dict[str, Any]]:
        """A row that was written before, as one of this run."""
        try:
            row = json.loads(line)
            number, answers = row["generation"]["row"], row["answers"]
            made_by = {name: row["generation"].get(name) for name in self._settings}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{origin}: not a row of answers ({error}). Name another --output.") from error
        prompt = self._prompts.get(number)
        if prompt is None or row["prompt"] != _as_json(prompt.prompt):
            raise UsageError(f"{origin} answers a prompt that is not row {number + 1} now. Name another --output.")
        made_by["n"] = len(answers)
        asked = {**self._settings, "n": self._n}
        other = [f"{name} {made_by[name]}, now {value}" for name, value in asked.items() if made_by[name] != value]
        if other:
            raise UsageError(f"{origin} was made with {'; '.join(other)}. Name another --output.")
        return number, row


def _refuse_foreign(origin: str, line: bytes) -> None:
    try:
        row = json.loads(line)
        is_own = isinstance(row, dict) and "row" in row["generation"] and "answers" in row
    except (ValueError, KeyError, TypeError, RecursionError):
        is_own = False
    if not is_own:
        raise DataError(f"{origin.removesuffix(':1')} holds something else than answers. Name another --output.")


def _as_json(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else list(prompt)
