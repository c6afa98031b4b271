"""Preference data, from a file or the Hub to token ids: read, checked, tokenized, cached."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data import pair_store
from qlora_dpo.data.building import TokenizingJob
from qlora_dpo.data.formats import ColumnNames, check_format
from qlora_dpo.data.report import DataReport
from qlora_dpo.data.sources import open_source
from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair
from qlora_dpo.errors import StorageError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairDataset(Sequence[TokenizedPair]):
    """Tokenized pairs, memory-mapped from the cache; a pair is read when it is asked for."""

    def __init__(self, folder: Path, report: DataReport, fingerprint: str) -> None:
        self.report = report
        self.fingerprint = fingerprint
        self._batches = pair_store.read_batches(folder)
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        # Views of the mapped file, (offsets, ids) for each id column of each batch; a pair is then two look-ups each.
        self._ids = [
            [(ids.offsets.to_numpy(), ids.values.to_numpy()) for ids in map(batch.column, pair_store.ID_COLUMNS)]
            for batch in self._batches
        ]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        number = bisect_right(self._ends, position)
        batch = self._batches[number]
        row = position - (self._ends[number] - batch.num_rows)
        prompt_ids, chosen_ids, rejected_ids = (
            values[offsets[row] : offsets[row + 1]].tolist() for offsets, values in self._ids[number]
        )
        category, confidence, origin = (batch.column(i)[row].as_py() for i in (3, 4, 5))
        return TokenizedPair(prompt_ids, chosen_ids, rejected_ids, category, confidence, origin)

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of tokens of every prompt, chosen and rejected answer."""
        prompt, chosen, rejected = (self._lengths_of(column) for column in range(len(pair_store.ID_COLUMNS)))
        return prompt, chosen, rejected

    def _lengths_of(self, column: int) -> NDArray[np.int64]:
        parts = [np.diff(batch[column][0]) for batch in self._ids]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


def load_preference_dataset(
    source: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dataset_format: str = "auto",
    split: str | None = None,
    revision: str | None = None,
    prompt_key: str = "prompt",
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
    max_length: int = 1024,
    max_prompt_length: int = 512,
    bad_rows: Literal["fail", "skip"] = "fail",
    cache_dir: str | Path | None = None,
    max_samples: int | None = None,
) -> PairDataset:
    """Read preference pairs from a file, a folder or the Hub and tokenize them, or take them from the cache.

    `max_samples` takes the first rows of the source; lengths are in tokens.

    Raises:
        DataError: when rows are bad and not to be skipped, or none is usable.
        StorageError: when the source cannot be read or the cache not written.
        UsageError: when the options, the source and the tokenizer do not fit together.
    """
    _check_options(dataset_format, bad_rows, max_samples)
    job = TokenizingJob(
        source=open_source(source, split=split, revision=revision),
        tokenizer=PairTokenizer(tokenizer, max_length, max_prompt_length),
        dataset_format=dataset_format,
        names=ColumnNames(prompt_key, chosen_key, rejected_key),
        max_samples=max_samples,
    )
    folder = _cache_root(cache_dir) / "tokenized" / job.key()
    manifest = pair_store.read_manifest(folder)
    from_cache = manifest is not None
    if manifest is None:
        job.build(folder)
        manifest = pair_store.read_manifest(folder)
    if manifest is None:
        raise StorageError(f"the tokenized pairs just written to {folder} read back differently; check that disk.")
    report = DataReport(
        **manifest["report"],
        refused=pair_store.read_refused(folder),
        from_cache=from_cache,
        refused_file=folder / pair_store.REFUSED_FILE,
    )
    report.check(bad_rows)
    return PairDataset(folder, report, manifest["fingerprint"])


def split_by_prompt(
    dataset: Sequence[TokenizedPair], fraction: float, seed: int, max_pairs: int | None = None
) -> tuple[list[int], list[int]]:
    """Divide the pairs into indices to train on and to evaluate on, all pairs of one prompt on the same side.

    Prompts are taken for evaluation in the order of a seeded hash while they fit into `fraction` of the pairs
    (and `max_pairs`), so the same data and seed give the same division on any machine.

    Raises:
        UsageError: when `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the fraction to evaluate on is {fraction}; it must be at least 0 and below 1.")
    groups: dict[bytes, list[int]] = {}
    for index, pair in enumerate(dataset):
        ids = np.asarray(pair.prompt_ids, np.int32).tobytes()
        groups.setdefault(hashlib.sha256(b"%d:" % seed + ids).digest(), []).append(index)
    room = round(fraction * len(dataset))
    room = room if max_pairs is None else min(room, max_pairs)
    evaluated: set[int] = set()
    for _, members in sorted(groups.items()):
        if len(evaluated) + len(members) <= room:
            evaluated.update(members)
    return [i for i in range(len(dataset)) if i not in evaluated], sorted(evaluated)


def _check_options(dataset_format: str, bad_rows: str, max_samples: int | None) -> None:
    if dataset_format != "auto":
        check_format(dataset_format)
    if bad_rows not in ("fail", "skip"):
        raise UsageError(f"--bad_rows {bad_rows!r} is not known; choose fail or skip.")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"--max_samples {max_samples} leaves no data; give at least 1, or leave it out for all.")


def _cache_root(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or os.environ.get("QLORA_DPO_CACHE") or "~/.cache/qlora_dpo").expanduser()
