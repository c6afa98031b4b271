"""Files of rows: JSON, JSON Lines, CSV and Parquet, each row with the line where it stands.

A row of a JSON or CSV file is named by the line it starts on, a row of a Parquet file by its number from 1.
A line of JSON Lines that is broken is one refused row; a JSON array or a CSV file that is broken cannot be
read on from there, so it is refused as a whole. Blank lines are no rows.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import IO, Any

import orjson

from qlora_dpo.data.preferences import UNREAD, RefusedRow, RowError
from qlora_dpo.errors import DataError, StorageError, UsageError

_CHUNK = 1 << 20  # bytes
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_PARQUET_ROWS = 1000
_ROWS_TO_DETECT_BY = 100


@dataclass(frozen=True, slots=True)
class Row:
    """The columns of one row and where it stands."""

    origin: str
    values: dict[str, Any]


Rows = Iterator[Row | RefusedRow]
Wanted = Collection[str] | None
"""The columns that somebody reads; None for all."""


def file_kind(path: Path) -> str | None:
    """Return the suffix by which a file is read, None for a file that no reader knows."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def settled_format(rows: Rows, detect: Callable[[dict[str, Any]], str | None]) -> tuple[str | None, Rows]:
    """The format of rows by the first that shows it, and all of the rows; a row may be bad, so a few are tried.

    `detect` names a row's format, or None where it says nothing about that of the others.

    Raises:
        UsageError: what `detect` raised for the first row, when none shows a format.
    """
    head = list(islice(rows, _ROWS_TO_DETECT_BY))
    errors = []
    for row in head:
        try:
            found = detect(row.values) if isinstance(row, Row) else None
        except UsageError as error:
            errors.append(error)
            continue
        except RowError as error:
            refused = error.refused(row.origin)
            errors.append(UsageError(f"cannot tell the format of the data by {refused}. Repair the row first."))
            continue
        if found is not None:
            return found, chain(head, rows)
    if errors:
        raise errors[0]
    return None, chain(head, rows)


def read_file(path: Path, wanted: Wanted = None) -> Rows:
    """Yield the rows of one file; of a file of columns only those that are wanted, `UNREAD` in place of the others.

    Raises:
        DataError: when the file is not what its name says.
        StorageError: when it cannot be read.
    """
    kind = file_kind(path)
    assert kind is not None, path
    try:
        yield from _read_parquet(path, wanted) if kind == ".parquet" else READERS[kind](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); copy or download it again.") from error
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot read {path}: {error.strerror or error}; check the path and its rights.")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield line number, byte offset and bytes, without a byte order mark."""
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            yield number, offset + len(line) - len(text), text
            offset += len(line)


def _not_utf8(path: Path, line: int, offset: int) -> DataError:
    return DataError(
        f"{path}:{line}: not UTF-8 at byte {offset} of the file; save the file as UTF-8 (iconv converts it)."
    )


def _read_json_lines(path: Path) -> Rows:
    for number, offset, line in _lines(path):
        if line.isspace() or not line:
            continue
        origin = f"{path}:{number}"
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            value = _with_nan(_check_utf8(path, number, offset, line))
            if value is None:
                yield RefusedRow(origin, "json", f"broken JSON ({error.msg}, column {error.colno})")
                continue
        yield _as_row(origin, value)


def _with_nan(line: str) -> object | None:
    """What a line says that has NaN or Infinity in it, as Python writes them though they are no JSON; else None."""
    try:
        return json.loads(line) if "NaN" in line or "Infinity" in line else None
    except (ValueError, RecursionError):
        return None


def _check_utf8(path: Path, number: int, offset: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, number, offset + error.start) from error


def _as_row(origin: str, value: object) -> Row | RefusedRow:
    if isinstance(value, dict):
        return Row(origin, value)
    return RefusedRow(origin, "json", f"a row must be an object (it is {type(value).__name__})")


def _read_json(path: Path) -> Rows:
    """Read an array of objects, or an object per line, whichever the first character says."""
    first = next((text for _, _, line in _lines(path) if (text := line.lstrip())), b"")
    yield from _read_json_array(path) if first.startswith(b"[") else _read_json_lines(path)


class _TextWindow:
    """The part of a long JSON text that is being read, with the line it starts on."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.position, self.line = "", 0, 1
        self.bytes_read, self.at_end = 0, False

    def grow(self) -> None:
        """Drop what was read and fetch as much again as is left, at least one chunk."""
        self.text, self.position = self.text[self.position :], 0
        chunk = self.file.read(max(_CHUNK, len(self.text)))
        self.bytes_read += len(chunk)
        self.at_end = not chunk
        try:
            self.text += self.decoder.decode(chunk, final=self.at_end)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            offset = self.bytes_read - len(error.object) + error.start
            raise _not_utf8(self.path, line, offset) from error

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def next_character(self) -> str:
        """Skip white space; return the character after it, empty at the end of the file."""
        while True:
            space = _SPACE.match(self.text, self.position)
            self.advance(space.end() if space else self.position)
            if self.position < len(self.text) or self.at_end:
                return self.text[self.position : self.position + 1]
            self.grow()

    def next_value(self) -> object:
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                # A fault in the JSON may be only the end of the window; others (too deep, too long) are not.
                if self.at_end or not isinstance(error, json.JSONDecodeError):
                    raise self.broken(getattr(error, "msg", str(error))) from error
            else:
                # A number that touches the end of the window may go on after it.
                if end < len(self.text) or self.at_end:
                    self.advance(end)
                    return value
            self.grow()

    def broken(self, why: str) -> DataError:
        return DataError(
            f"{self.path}:{self.line}: broken JSON in or before the array element that starts here: {why}. "
            "The rest of the array cannot be read; repair the file, or write one object per line (.jsonl)."
        )


def _read_json_array(path: Path) -> Rows:
    with _open(path) as file:
        window = _TextWindow(path, file)
        window.next_character()
        window.advance(window.position + 1)  # the opening bracket
        mark = window.next_character()
        while mark != "]":
            origin = f"{path}:{window.line}"
            yield _as_row(origin, window.next_value())
            mark = window.next_character()
            if mark not in (",", "]"):
                raise window.broken("no comma or closing bracket after an element")
            if mark == ",":
                window.advance(window.position + 1)
                window.next_character()
        window.advance(window.position + 1)
        if window.next_character():
            raise window.broken("text after the array's closing bracket")


def _read_csv(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)  # the default refuses answers above 128 KiB
    # strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    reader = csv.reader((_check_utf8(path, *line) for line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: two columns have the same name ({', '.join(header)}); rename one.")
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                yield _csv_row(f"{path}:{start}", header, cells)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{reader.line_num}: broken CSV: {error}. The rest of the file cannot be read; "
            "check the quotes around here (a quote inside a field is written twice)."
        ) from error


def _csv_row(origin: str, header: list[str], cells: list[str]) -> Row | RefusedRow:
    if len(cells) != len(header):
        detail = f"{len(cells)}, header {len(header)}"
        return RefusedRow(origin, "csv", f"not as many cells as the header ({detail})")
    return Row(origin, dict(zip(header, cells, strict=True)))


def _read_parquet(path: Path, wanted: Wanted = None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if wanted is None or name in wanted]
            yield from arrow_rows(str(path), names, file.iter_batches(_PARQUET_ROWS, columns=columns), wanted)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow calls broken content an OSError too
            raise
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}; write it again.") from error


def arrow_rows(name: str, columns: Sequence[str], batches: Iterable[Any], wanted: Wanted) -> Rows:
    """Yield the rows of Arrow batches or tables; `columns` are those that the source has."""
    unread = {column: UNREAD for column in columns if wanted is not None and column not in wanted}
    read = [column for column in columns if column not in unread]
    numbers = count(1)
    for batch in batches:
        found = batch.select(read)
        for values in found.to_pylist() if read else repeat({}, batch.num_rows):
            yield Row(f"{name}:{next(numbers)}", {**_without_nulls(values), **unread})


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """The row without the keys that Arrow gives every object because one of them has it; columns stay."""
    return {column: _filled(value) if isinstance(value, (list, dict)) else value for column, value in values.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
