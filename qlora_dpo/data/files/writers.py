"""Files of rows to write: JSON, JSON Lines, CSV and Parquet, by the suffix of the name, as `readers` reads them.

A file is there whole or as it was before.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import IO, Any, cast

import orjson

from qlora_dpo.data.files.readers import file_kind
from qlora_dpo.data.files.row_file import new_row_file
from qlora_dpo.data.preferences import NoPlaceError

_PARQUET_ROWS = 1000

AddRow = Callable[[dict[str, Any]], object]
Writer = Callable[[IO[bytes], Mapping[str, Any]], AbstractContextManager[AddRow]]


@contextmanager
def row_writer(path: Path, example: Mapping[str, Any]) -> Iterator[AddRow]:
    """Give a function that adds a row to a file; `example` is a row with every column that there can be.

    That function raises NoPlaceError where the kind of file has no place for a value.

    Raises:
        StorageError: when the disk refuses.
    """
    kind = file_kind(path)
    assert kind is not None, path
    with new_row_file(path) as file, WRITERS[kind](file, example) as add:
        yield add


def is_flat(path: Path) -> bool:
    """The kind of file holds text and numbers only."""
    return file_kind(path) == ".csv"


@contextmanager
def _json_lines(file: IO[bytes], _example: Mapping[str, Any]) -> Iterator[AddRow]:
    yield lambda row: file.write(orjson.dumps(row) + b"\n")


@contextmanager
def _json(file: IO[bytes], _example: Mapping[str, Any]) -> Iterator[AddRow]:
    separators = chain([b"[\n"], repeat(b",\n"))
    yield lambda row: file.write(next(separators) + orjson.dumps(row))
    file.write(b"\n]\n")


@contextmanager
def _csv(file: IO[bytes], example: Mapping[str, Any]) -> Iterator[AddRow]:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.DictWriter(text, [column for column, value in example.items() if not _is_nested(value)])

    def add(row: dict[str, Any]) -> None:
        for column, value in row.items():
            if _is_nested(value):
                raise NoPlaceError(column, "a list in a CSV file", column)
        writer.writerow(row)

    writer.writeheader()
    yield add
    text.detach()


def _is_nested(value: object) -> bool:
    return isinstance(value, (list, dict))


@contextmanager
def _parquet(file: IO[bytes], example: Mapping[str, Any]) -> Iterator[AddRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # What may have any form, of which a file of columns has one only, is text there.
    free = [column for column, value in example.items() if value in ([], {})]
    schema = pa.Table.from_pylist([dict(example) | dict.fromkeys(free, "")]).schema
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        parquet.write_table(pa.Table.from_pylist(rows, schema=schema))
        rows.clear()

    def add(row: dict[str, Any]) -> None:
        for column, value in row.items():
            _refuse_unknown_keys(column, value, example[column])
        rows.append(row | {column: _json_text(row[column]) for column in free if column in row})
        if len(rows) == _PARQUET_ROWS:
            flush()

    with pq.ParquetWriter(file, schema) as parquet:
        yield add
        flush()


def _refuse_unknown_keys(column: str, value: object, example: object) -> None:
    """Refuse what Arrow would leave out without a word: keys of an object that it does not know.

    Raises:
        NoPlaceError: naming the key.
    """
    if isinstance(value, list) and isinstance(example, list) and example:
        for item in value:
            _refuse_unknown_keys(column, item, example[0])
    elif isinstance(value, dict) and isinstance(example, dict) and example:
        for key, item in value.items():
            if key not in example:
                part = f"{key} of a message in a Parquet file, but in one of JSON,"
                raise NoPlaceError(column, part, "thoughts" if key == "reasoning_content" else key)
            _refuse_unknown_keys(column, item, example[key])


def _zipped(writer: Writer) -> Writer:
    @contextmanager
    def write(file: IO[bytes], example: Mapping[str, Any]) -> Iterator[AddRow]:
        # No time and no name in the header (the name would be the hidden one): the same rows are the same file.
        with (
            gzip.GzipFile("", fileobj=file, mode="wb", compresslevel=6, mtime=0) as zipped,
            writer(cast(IO[bytes], zipped), example) as add,
        ):
            yield add

    return write


WRITERS: dict[str, Writer] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _zipped(_json_lines),
    ".json": _json,
    ".json.gz": _zipped(_json),
    ".csv": _csv,
    ".parquet": _parquet,
}


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
