"""`data convert`: pairs from one format and kind of file into another, with every row accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

from qlora_dpo.config.checks import nearest
from qlora_dpo.config.data import ConvertOptions, PairFileOptions
from qlora_dpo.data.files.readers import file_kind
from qlora_dpo.data.files.writers import WRITERS, AddRow, is_flat, row_writer
from qlora_dpo.data.formats import WRITTEN, all_columns, check_format, write_row
from qlora_dpo.data.pair_reader import PairReader, reader_of
from qlora_dpo.data.preferences import Message, NoPlaceError, PreferencePair, RefusedRow, RowError
from qlora_dpo.data.progress import with_progress
from qlora_dpo.data.report import account_of, listed, not_read
from qlora_dpo.errors import DataError, StorageError, UsageError
from qlora_dpo.files.guard import check_output, lines_with

_IS_REFUSED_LIST = lines_with(lambda row: row.keys() == {field.name for field in fields(RefusedRow)})


def convert(pairs: PairFileOptions, options: ConvertOptions) -> None:
    """Write the pairs of a source in another format.

    Raises:
        DataError: when rows cannot be written and are not to be skipped, or none can.
        StorageError: when something cannot be read or written.
        UsageError: when an option cannot work.
    """
    _check(pairs, options)
    reader = reader_of(pairs)
    conversion = Conversion(options.to, tuple(options.drop), options.output, options.system_prompt == "fold")
    with row_writer(options.output, all_columns(options.to)) as add:
        conversion.run(reader, add)
        conversion.list_refused()
        conversion.check(pairs.file, reader.dataset_format, options.bad_rows)
    print("\n".join(conversion.summary(pairs.file, reader)))


@dataclass
class Conversion:
    """What becomes of the rows of a source; always `read == written + len(refused)`.

    Where a row holds several pairs, each of them is counted.
    """

    to: str
    drop: tuple[str, ...]
    output: Path
    folds_system: bool = False
    read: int = 0
    written: int = 0
    refused: list[RefusedRow] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def refused_file(self) -> Path:
        """Where the refused rows are listed."""
        return refused_file(self.output)

    def run(self, rows: Iterable[PreferencePair | RefusedRow], add: AddRow) -> None:
        """Write each row that can be written."""
        for row in with_progress(rows, "converting"):
            self.read += 1
            if isinstance(row, RefusedRow):
                self.refused.append(row)
                continue
            try:
                self.dropped.update(self._write(with_folded_system(row) if self.folds_system else row, add))
            except RowError as error:
                self.refused.append(error.refused(row.origin))
            else:
                self.written += 1

    def _write(self, pair: PreferencePair, add: AddRow) -> list[str]:
        """Write a pair without what may be dropped, where there is no place for it; returns what was dropped."""
        dropped: list[str] = []
        while True:
            try:
                add(write_row(self.to, pair))
                return dropped
            except NoPlaceError as error:
                if error.drop not in self.drop or error.drop in dropped:
                    raise
                pair = DROPS[error.drop](pair)
                dropped.append(error.drop)

    def list_refused(self) -> None:
        """Write the refused rows beside the output, or remove the list of an earlier time.

        Raises:
            StorageError: when the disk refuses.
        """
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.refused]
        try:
            if lines:
                self.refused_file.write_text("".join(lines), encoding="utf-8")
            else:
                self.refused_file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.refused_file} cannot be written: {error.strerror or error}; name another --output."
            ) from error

    def check(self, source: str, dataset_format: str, bad_rows: str) -> None:
        """Refuse to leave rows out unless they are to be skipped, or to write none.

        Raises:
            DataError: with the first of the refused rows.
        """
        bad = [row for row in self.refused if not row.left_out]
        if self.written and (bad_rows == "skip" or not bad):
            return
        bad = bad or self.refused
        advice = f", or write the other {self.written} with --bad_rows skip" if self.written else ""
        raise DataError(
            f"{len(bad)} of {self.read} rows of {source} ({dataset_format}) cannot be written as {self.to}:\n"
            f"{listed(bad)}\nRepair them{advice}. All are listed in {self.refused_file}; nothing else was written."
        )

    def summary(self, source: str, reader: PairReader) -> list[str]:
        """The account as lines to print."""
        lines = [
            f"{source}: {self.written:,} pairs from {self.read - reader.further_pairs:,} rows "
            f"({reader.dataset_format}) are in {self.output} ({self.to})",
            *account_of(self.refused, self.refused_file),
        ]
        lines += [f"repaired: {count:,} x {kind}" for kind, count in reader.repaired.items()]
        lines += not_read(reader.unread.names)
        lines += [f"dropped: {count:,} x {name}" for name, count in self.dropped.items()]
        return lines


def refused_file(output: Path) -> Path:
    """The list of refused rows beside a file of rows; its name is not that of such a file."""
    return output.with_name(f"{output.name}.refused")


def _check(pairs: PairFileOptions, options: ConvertOptions) -> None:
    check_format(options.to, "to")
    for name in options.drop:
        if name not in DROPS:
            raise UsageError(f"--drop {name}: known are {', '.join(DROPS)}{nearest(name, DROPS)}.")
    if file_kind(options.output) is None:
        raise UsageError(f"--output {options.output}: its name must end with one of {', '.join(WRITERS)}.")
    if is_flat(options.output) and not isinstance(WRITTEN[options.to].EXAMPLE["chosen"], str):
        raise UsageError(
            f"--output {options.output}: a CSV file holds text only, and an answer in {options.to} is a message. "
            "Choose another suffix, or --to plaintext."
        )
    check_output(options.output, inputs=[pairs.file])
    check_output(refused_file(options.output), inputs=[pairs.file], is_own=_IS_REFUSED_LIST, option=None)


def _without_system(pair: PreferencePair) -> PreferencePair:
    return _with_prompt(pair, (message for message in pair.messages if message["role"] != "system"))


def with_folded_system(pair: PreferencePair) -> PreferencePair:
    """The pair with its system prompts in front of the first question, blank lines between them."""
    system = list(takewhile(lambda message: message["role"] == "system", pair.messages))
    first, *rest = pair.messages[len(system) :]
    if not system or first["role"] != "user":
        return pair
    texts = [message["content"] for message in (*system, first) if message["content"]]
    return _with_prompt(pair, (Message(role="user", content="\n\n".join(texts)), *rest))


def _without_history(pair: PreferencePair) -> PreferencePair:
    *before, last = pair.messages
    return _with_prompt(pair, (*(message for message in before if message["role"] == "system"), last))


def _without_whitespace(pair: PreferencePair) -> PreferencePair:
    stripped = (Message(**message | {"content": message["content"].strip()}) for message in pair.messages)
    return replace(_with_prompt(pair, stripped), chosen=pair.chosen.strip(), rejected=pair.rejected.strip())


def _without_thoughts(pair: PreferencePair) -> PreferencePair:
    def without(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in fields.items() if key != "reasoning_content"}

    return replace(
        pair,
        prompt=tuple(cast(Message, without(message)) for message in pair.messages),
        chosen_fields=without(pair.chosen_fields),
        rejected_fields=without(pair.rejected_fields),
    )


def _with_prompt(pair: PreferencePair, messages: Iterable[Message]) -> PreferencePair:
    return replace(pair, prompt=tuple(messages))


DROPS: dict[str, Callable[[PreferencePair], PreferencePair]] = {
    "system": _without_system,
    "history": _without_history,
    "whitespace": _without_whitespace,
    "thoughts": _without_thoughts,
    "tools": lambda pair: replace(pair, tools=()),
    "chat_template_kwargs": lambda pair: replace(pair, chat_template_kwargs={}),
    "reference_logps": lambda pair: replace(pair, reference_logps=None),
}
