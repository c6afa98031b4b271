"""Where rows come from: a file, a folder of files, a `save_to_disk` folder, a data set on the Hub or a config of it
(`owner/name:config`), or `modelscope:ORG/NAME[@revision]`.

Every source has splits. A single file is the split `train`; a folder's splits are read off its file names,
as the Hub does. Without a name, `train` is taken, or the only split there is.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.data.files.hubs import MODELSCOPE, first_line, load_from_hub, modelscope_folder
from qlora_dpo.data.files.readers import READERS, Rows, Wanted, arrow_rows, file_kind, read_file, unreadable
from qlora_dpo.errors import DataError, StorageError, UsageError

# Files that describe a data set and hold no rows of it.
_METADATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT_WORDS = {
    "train": "train training",
    "validation": "validation valid val dev",
    "test": "test testing eval evaluation",
}
_SPLIT_BY_WORD = {word: split for split, words in _SPLIT_WORDS.items() for word in words.split()}
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")
_HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<config>[^:/]+))?")
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that can be read more than once, and a hash that changes when they do."""

    name: str
    rows: Callable[[Wanted], Rows]
    """Reads them; a file of columns leaves `UNREAD` where a column is not wanted."""
    fingerprint: Callable[[], str]


def read_rows(source: str, *, split: str | None = None, revision: str | None = None) -> Rows:
    """Yield the rows of a source, with a `RefusedRow` where a row could not be read.

    Raises:
        DataError: when the content is not readable as rows, or there is none.
        StorageError: when the source is not there or cannot be reached.
        UsageError: when it has no such split.
    """
    yield from open_source(source, split=split, revision=revision).rows(None)


def open_source(source: str, *, split: str | None = None, revision: str | None = None) -> Source:
    """Find a source; its rows are read later. Raises as `read_rows`."""
    if not source:
        raise UsageError("the data source is an empty text; name a file, a folder or a Hub id.")
    if source.startswith(MODELSCOPE):
        return _folder_source(modelscope_folder(source, revision), split)
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise StorageError(f"cannot look up {_shown(source)}: {error}; check the path.") from error
    if not is_file and not is_folder:
        return _hub_source(source, split, revision)
    if revision is not None:
        raise UsageError(f"revision {revision!r} has no meaning for {source}, which is local; leave it out.")
    if is_file:
        return _file_source(path, split)
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _saved_source(path, split)
    return _folder_source(path, split)


def with_config(source: str, config: str | None) -> str:
    """The name of a config of a data set on the Hub, by which `open_source` finds it.

    Raises:
        UsageError: when a config has no meaning for the source.
    """
    if config is None:
        return source
    if source.startswith(MODELSCOPE) or Path(source).expanduser().exists():
        raise UsageError(
            f"--dataset_config {config} has no meaning for {source}, which is not on the Hub; leave it out."
        )
    if ":" in source:
        raise UsageError(f"{source} names a config, and --dataset_config {config} is given too; leave one of them out.")
    return f"{source}:{config}"


def _file_source(path: Path, split: str | None) -> Source:
    if file_kind(path) is None:
        raise UsageError(f"cannot read {path}: its name must end with one of {', '.join(READERS)}.")
    _choose_split(str(path), {"train": [path]}, split)
    return _files(str(path), [path])


def _folder_source(folder: Path, split: str | None) -> Source:
    splits: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and file_kind(path) and path.name not in _METADATA and not hidden:
            splits[_split_of(relative)].append(path)
    if not splits:
        raise UsageError(f"no data in {folder}: it holds no file that ends with {', '.join(READERS)}.")
    chosen = _choose_split(str(folder), splits, split)
    return _files(str(folder), splits[chosen])


def _split_of(path: Path) -> str:
    """Name a file's split: `train_prefs-00000-of-00001`, or a word such as `test` in its name or folders."""
    if shard := _SHARD.match(path.name):
        return shard["split"]
    words = reversed(re.split(r"[^a-z]+", str(path.as_posix()).lower()))
    return next((_SPLIT_BY_WORD[word] for word in words if word in _SPLIT_BY_WORD), "train")


def _choose_split(name: str, splits: Iterable[str], wanted: str | None) -> str:
    there = sorted(splits)
    if wanted is None and len(there) == 1:
        return there[0]
    if (wanted or "train") in there:
        return wanted or "train"
    missing = "no split named" if wanted else "no split is named train, so name one with --split"
    raise UsageError(f"{name}: {missing}{f' {wanted!r}' if wanted else ''}; there is {', '.join(there)}.")


def _files(name: str, paths: list[Path]) -> Source:
    def rows(wanted: Wanted) -> Rows:
        for path in paths:
            yield from read_file(path, wanted)

    return Source(name, lambda wanted: _refuse_none(name, rows(wanted)), lambda: _hash_files(paths))


def _refuse_none(name: str, rows: Rows) -> Rows:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{name} holds no rows; give a file with at least one preference pair.")


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        # The name is part of every row's origin, so a moved file is another source.
        digest.update(f"\0{path}\0".encode(errors="surrogateescape"))
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise unreadable(path, error) from error
    return digest.hexdigest()


def _saved_source(folder: Path, split: str | None) -> Source:
    from datasets import DatasetDict, load_from_disk

    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # the library raises whatever its parsers raise
        raise DataError(
            f"{folder} does not load as a save_to_disk folder: {first_line(error)}; save it again."
        ) from error
    name = str(folder)
    if isinstance(loaded, DatasetDict):
        chosen = _choose_split(name, loaded, split)
        loaded, folder = loaded[chosen], folder / chosen
    else:
        _choose_split(name, ["train"], split)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return Source(name, lambda wanted: _dataset_rows(name, loaded, wanted), lambda: _hash_files(files))


def _dataset_rows(name: str, dataset: Any, wanted: Wanted) -> Rows:
    # As Arrow: the library would otherwise decode pictures and sounds.
    tables = dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    return _refuse_none(name, arrow_rows(name, dataset.column_names, tables, wanted))


def _hub_source(source: str, split: str | None, revision: str | None) -> Source:
    path = Path(source).expanduser()
    name = _HUB_ID.fullmatch(source)
    if not name or file_kind(path):
        raise StorageError(
            f"{_shown(source)} is neither a local path nor reachable as a Hub id: nothing is there, "
            "and a Hub id has the form owner/name or owner/name:config. Check the path."
        )
    loaded = load_from_hub(name["id"], name["config"], split, revision)
    fingerprint = f"{source}@{loaded._fingerprint}"
    return Source(source, lambda wanted: _dataset_rows(source, loaded, wanted), lambda: fingerprint)


def _shown(source: str) -> str:
    return repr(source if len(source) <= 200 else source[:197] + "...")
