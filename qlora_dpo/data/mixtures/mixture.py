"""A mixture: a file that names sources and how often the rows of each, or of each of its categories, are taken.

    sources:
      - path: code.jsonl
        sample_rate: 1.5
      - path: owner/name
        split: train
        ratio:
          - {category_name: math, sample_rate: 2}
          - {category_name: small talk, sample_rate: 0.3}

OpenDPO's ratio file, one JSON object with `data_name`, `data_path` and `ratio`, is such a file with one source.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from qlora_dpo.config.checks import nearest
from qlora_dpo.data.conversations import ConversationColumns
from qlora_dpo.data.files.sources import with_config
from qlora_dpo.data.preferences import ColumnNames
from qlora_dpo.errors import DataError, StorageError

UNCOUNTED = 0
"""OpenDPO's category for what is in no statistics."""

COLUMN_OPTIONS = tuple(
    dict.fromkeys(
        column.name if column.name == "ignore_columns" else f"{column.name}_key"
        for names in (ColumnNames, ConversationColumns)
        for column in fields(names)
    )
)
"""Options that name the columns of a single data set, which each source may have."""

_MOST_BYTES = 1 << 24  # of a .json that may be a ratio file; pairs can be any size


@dataclass(frozen=True, slots=True)
class CategoryRate:
    """How often the rows of one category are taken, which is known by its name or its number."""

    sample_rate: float = 1.0
    category_id: int | None = None
    category_name: str | None = None
    size: int | None = None
    """Rows that the file's author counted."""

    @property
    def label(self) -> str:
        """The category as a row has it: its name, or its number where it has none."""
        return self.category_name or str(self.category_id)


@dataclass(frozen=True, slots=True)
class MixtureSource:
    """A file, folder or Hub id, how to read it, and how often its rows are taken."""

    path: str
    name: str
    """Stands for the category of a row that has none."""
    sample_rate: float = 1.0
    """Of the rows whose category is not in `ratio`."""
    ratio: tuple[CategoryRate, ...] = ()
    format: str = "auto"
    split: str | None = None
    revision: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    """Names of columns, by the option that gives them to a single data set."""
    lists_all: bool = False
    """Whether `ratio` is meant to have every category."""

    def entry_of(self, category: str | None) -> CategoryRate | None:
        """What `ratio` says about a category, by name before number."""
        by_name = (entry for entry in self.ratio if category and entry.category_name == category)
        by_number = (entry for entry in self.ratio if category and str(entry.category_id) == category)
        return next(by_name, None) or next(by_number, None)

    def rate_of(self, category: str | None) -> float:
        """How often a row of this category is taken in an epoch, on average."""
        entry = self.entry_of(category)
        return self.sample_rate if entry is None else entry.sample_rate


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sources of a mixture file."""

    path: Path
    sources: tuple[MixtureSource, ...]

    def notes(self, found: Mapping[tuple[int, str | None], int]) -> list[str]:
        """Where what was found, rows by source number and category, is not what the file expects."""
        lines = []
        for number, source in enumerate(self.sources):
            rows = {category: count for (of, category), count in found.items() if of == number}
            lines += [f"{source.path}: {note}" for note in _notes(source, rows)]
        return lines


def is_mixture(path: str) -> bool:
    """Whether a data set's name stands for a mixture: a .yaml, or a .json that holds one object with a `ratio`."""
    file = Path(path).expanduser()
    suffix = file.suffix.lower()
    try:
        if suffix != ".json" or file.stat().st_size > _MOST_BYTES:
            return suffix in (".yaml", ".yml")
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):  # no file, or an object per line
        return False
    ratio = content.get("ratio") if isinstance(content, dict) else None
    return isinstance(ratio, list) and all(isinstance(entry, dict) for entry in ratio)


def read_mixture(path: str | Path) -> Mixture:
    """Read a mixture file.

    Raises:
        DataError: when something in it cannot be meant, with its place.
        StorageError: when it cannot be read.
    """
    file = Path(path).expanduser()
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read the mixture {file}: {error.strerror or error}; check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file} is not readable as a mixture: {reason}; repair it there.") from error
    if isinstance(content, dict) and not {"data_path", "data_name", "ratio"}.isdisjoint(content):
        return Mixture(file, (_opendpo_source(content, file),))
    entries = _record(content, _MIXTURE, str(file)).get("sources", []) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file} names no sources; write a list of them under sources:, each with its path:.")
    sources = [_source(entry, file, f"{file}: sources[{number}]") for number, entry in enumerate(entries)]
    return Mixture(file, tuple(sources))


def _source(entry: object, file: Path, where: str) -> MixtureSource:
    values = _record(entry, _SOURCE, where)
    if "path" not in values:
        raise DataError(f"{where}: no path; name a file, a folder or a Hub id.")
    keys = {option: values.pop(option) for option in COLUMN_OPTIONS if option in values}
    path = with_config(_found(values.pop("path"), file), values.pop("config", None))
    return MixtureSource(path=path, name=values.pop("name", Path(path).name.split(".")[0]), keys=keys, **values)


def _opendpo_source(content: dict[str, Any], file: Path) -> MixtureSource:
    values = _record(content, _OPENDPO, str(file))
    if not values.get("data_path"):
        raise DataError(
            f"{file}: no data_path, so nobody knows whose ratio this is; write the path of the pairs there."
        )
    path = _found(values["data_path"], file)
    name = values.get("data_name") or Path(path).name.split(".")[0]
    ratio = values.get("ratio", ())
    if all(entry.category_id != UNCOUNTED for entry in ratio):
        ratio += (CategoryRate(0.0, UNCOUNTED),)
    return MixtureSource(path, name, ratio=ratio, lists_all=True)


def _found(path: str, mixture: Path) -> str:
    """A path beside the mixture file, where there is one; else as it was written (a Hub id, or from here)."""
    beside = mixture.parent / Path(path).expanduser()
    return str(beside) if beside.exists() else path


def _notes(source: MixtureSource, rows: Mapping[str | None, int]) -> list[str]:
    found: dict[int, int] = {}
    lines = []
    for category, count in rows.items():
        entry = source.entry_of(category)
        if entry is not None:
            found[id(entry)] = found.get(id(entry), 0) + count
            if entry.category_id == UNCOUNTED:
                lines.append(_note_on_uncounted(entry, count))
        elif source.lists_all:
            what = f"category {category}" if category else "no category"
            lines.append(f"{what}: not in ratio, taken at rate {source.sample_rate:g} (rows: {count:,})")
    for entry in source.ratio:
        count = found.get(id(entry), 0)
        if entry.size is not None and entry.size != count:
            lines.append(f"category {entry.label}: size {entry.size:,} in ratio, found {count:,}")
        elif not count and entry.category_id != UNCOUNTED:
            near = nearest(entry.label, [category for category in rows if category])
            lines.append(f"category {entry.label}: in ratio, but no row has it{near}")
    return lines


def _note_on_uncounted(entry: CategoryRate, count: int) -> str:
    if not entry.sample_rate:
        return f"category {entry.label}: left out, number 0 without a rate above 0 (rows: {count:,})"
    return (
        f"category {entry.label}: number 0, of which OpenDPO shows no loss; taken at rate {entry.sample_rate:g} "
        f"and shown as any other (rows: {count:,})"
    )


def _record(value: object, known: Mapping[str, Callable[[str, object], Any]], where: str) -> dict[str, Any]:
    """The values of an object whose keys are all known; one that is null is as good as absent."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be keys with values ({', '.join(known)}); it is {_shown(value)}.")
    for key in value:
        if key not in known:
            raise DataError(
                f"{where}: {_shown(key)} is not a key of it{nearest(str(key), known)}. It may have {', '.join(known)}."
            )
    return {key: known[key](f"{where}: {key}", item) for key, item in value.items() if item is not None}


def _text(where: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: must be text; it is {_shown(value)}.")
    return str(value)


def _names(where: str, value: object) -> tuple[str, ...]:
    return tuple(_text(where, item) for item in (value if isinstance(value, list) else [value]))


def _count(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{where}: must be a whole number from 0; it is {_shown(value)}.")
    return value


def _rate(where: str, value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise DataError(
            f"{where}: must be a number from 0 (1.5: every row once and half of them twice); it is {_shown(value)}."
        )
    return float(value)  # type: ignore[arg-type]


def _ratio(where: str, value: object) -> tuple[CategoryRate, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: must be a list of categories; it is {_shown(value)}.")
    entries = tuple(_category(item, f"{where}[{number}]") for number, item in enumerate(value))
    for key in ("category_name", "category_id"):
        given = [known for entry in entries if (known := getattr(entry, key)) is not None]
        twice = next((known for place, known in enumerate(given) if known in given[:place]), None)
        if twice is not None:
            raise DataError(f"{where}: {key} {_shown(twice)} stands there twice; keep one of the two.")
    return entries


def _category(item: object, where: str) -> CategoryRate:
    values = _record(item, _CATEGORY, where)
    entry = CategoryRate(**values | {"category_name": values.get("category_name") or None})
    if entry.category_name is None and entry.category_id is None:
        raise DataError(f"{where}: names no category; give it a category_name, or the category_id.")
    return entry


def _as_is(_where: str, value: object) -> object:
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_CATEGORY: dict[str, Callable[[str, object], Any]] = {
    "category_id": _count,
    "category_name": _text,
    "size": _count,
    "sample_rate": _rate,
}
_SOURCE: dict[str, Callable[[str, object], Any]] = {
    "path": _text,
    "name": _text,
    "sample_rate": _rate,
    "ratio": _ratio,
    "format": _text,
    "split": _text,
    "revision": _text,
    "config": _text,
    **dict.fromkeys(COLUMN_OPTIONS, _text),
    "ignore_columns": _names,
}
_MIXTURE: dict[str, Callable[[str, object], Any]] = {"sources": _as_is}
_OPENDPO: dict[str, Callable[[str, object], Any]] = {"data_name": _text, "data_path": _text, "ratio": _ratio}
