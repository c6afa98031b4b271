"""Data to train on, from a file or the Hub to token ids: read, checked, tokenized, cached."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from qlora_dpo.data import pair_store
from qlora_dpo.data.building import CONVERSATIONS, PAIRS, TokenizingJob
from qlora_dpo.data.conversation_tokens import ConversationTokenizer, TokenizedConversation
from qlora_dpo.data.conversations import ConversationColumns, check_conversation_format
from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.formats import ColumnNames, check_format
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.ragged import Ragged
from qlora_dpo.data.report import DataReport
from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair
from qlora_dpo.environment import cache_folder
from qlora_dpo.errors import StorageError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


class StoredDataset(Sequence[T]):
    """Tokenized samples, memory-mapped from the cache; one is read when it is asked for."""

    sample: ClassVar[type]

    def __init__(self, folder: Path, report: DataReport, fingerprint: str) -> None:
        self.folder = folder
        self.report = report
        self.fingerprint = fingerprint
        self._batches = pair_store.read_batches(folder)
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        # Views of the mapped file, (offsets, ids) for each id column of each batch; a sample is then two look-ups each.
        columns = pair_store.id_columns(self.sample)
        self._ids = [
            [(ids.offsets.to_numpy(), ids.values.to_numpy()) for ids in map(batch.column, columns)]
            for batch in self._batches
        ]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        number = bisect_right(self._ends, position)
        batch = self._batches[number]
        row = position - (self._ends[number] - batch.num_rows)
        ids = [values[offsets[row] : offsets[row + 1]].tolist() for offsets, values in self._ids[number]]
        others = [batch.column(place)[row].as_py() for place in range(len(ids), batch.num_columns)]
        sample: T = self.sample(*ids, *others)
        return sample

    def origins(self) -> list[str]:
        """Return where every sample stands."""
        return [origin for batch in self._batches for origin in batch.column("origin").to_pylist()]

    def categories(self) -> list[str | None]:
        """Return the category of every sample."""
        return [category for batch in self._batches for category in batch.column("category").to_pylist()]

    def _lengths_of(self, column: int) -> NDArray[np.int64]:
        parts = [np.diff(batch[column][0]) for batch in self._ids]
        return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int64)


class PairDataset(StoredDataset[TokenizedPair]):
    """Tokenized preference pairs, with their texts at hand."""

    sample = TokenizedPair

    def __init__(self, folder: Path, report: DataReport, fingerprint: str, texts: PairReader) -> None:
        super().__init__(folder, report, fingerprint)
        self.texts = texts

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of tokens of every prompt, chosen and rejected answer."""
        return self._lengths_of(0), self._lengths_of(1), self._lengths_of(2)

    def reference_sums(self) -> NDArray[np.float64]:
        """Return the log-probs [pairs, 2] of both answers that rows bring along, NaN where they bring none."""
        columns = ("reference_chosen_logp", "reference_rejected_logp")
        found = [
            np.stack([batch.column(name).to_numpy(zero_copy_only=False) for name in columns], axis=1)
            for batch in self._batches
        ]
        return np.concatenate([np.empty((0, 2)), *found])

    def id_batches(self) -> Iterator[tuple[Ragged, Ragged, Ragged]]:
        """Yield views of the prompt, chosen and rejected ids, a batch of pairs at a time."""
        for batch in self._ids:
            prompt, chosen, rejected = (Ragged.view(offsets, ids) for offsets, ids in batch)
            yield prompt, chosen, rejected


class ConversationDataset(StoredDataset[TokenizedConversation]):
    """Tokenized conversations."""

    sample = TokenizedConversation

    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of tokens of every conversation, those before its first learned one, and those learned."""
        before, learned = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for _, (offsets, borders) in self._ids:
            rows = Ragged.view(offsets, borders)
            before.append(rows.firsts())
            if len(rows):
                learned.append(np.add.reduceat(rows.values[1::2] - rows.values[::2], rows.offsets[:-1] // 2))
        return self._lengths_of(0), np.concatenate(before), np.concatenate(learned).astype(np.int64)


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
    category_key: str = "category",
    confidence_key: str = "confidence",
    ignore_columns: Sequence[str] = (),
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
    if dataset_format != "auto":
        check_format(dataset_format)
    job = TokenizingJob(
        kind=PAIRS,
        source=open_source(source, split=split, revision=revision),
        tokenizer=PairTokenizer(tokenizer, max_length, max_prompt_length),
        dataset_format=dataset_format,
        names=ColumnNames(prompt_key, chosen_key, rejected_key, category_key, confidence_key, tuple(ignore_columns)),
        max_samples=max_samples,
    )
    folder, report, fingerprint = _from_cache(job, bad_rows, cache_dir)
    return PairDataset(
        folder, report, fingerprint, PairReader(job.source, report.dataset_format, job.names, max_samples)
    )


def load_conversation_dataset(
    source: str,
    *,
    tokenizer: PreTrainedTokenizerBase,
    dataset_format: str = "auto",
    split: str | None = None,
    revision: str | None = None,
    messages_key: str = "messages",
    prompt_key: str = "prompt",
    response_key: str = "response",
    category_key: str = "category",
    ignore_columns: Sequence[str] = (),
    max_length: int = 1024,
    bad_rows: Literal["fail", "skip"] = "fail",
    cache_dir: str | Path | None = None,
    max_samples: int | None = None,
) -> ConversationDataset:
    """The same for SFT: conversations, or prompts with their responses.

    Raises:
        DataError, StorageError, UsageError: see `load_preference_dataset`.
    """
    if dataset_format != "auto":
        check_conversation_format(dataset_format)
    job = TokenizingJob(
        kind=CONVERSATIONS,
        source=open_source(source, split=split, revision=revision),
        tokenizer=ConversationTokenizer(tokenizer, max_length),
        dataset_format=dataset_format,
        names=ConversationColumns(messages_key, prompt_key, response_key, category_key, tuple(ignore_columns)),
        max_samples=max_samples,
    )
    return ConversationDataset(*_from_cache(job, bad_rows, cache_dir))


def _from_cache(job: TokenizingJob, bad_rows: str, cache_dir: str | Path | None) -> tuple[Path, DataReport, str]:
    """The job's store, built where it is not there yet, with its report and the hash of its ids."""
    _check_options(bad_rows, job.max_samples)
    folder = cache_folder(cache_dir) / "tokenized" / job.key()
    manifest = pair_store.read_manifest(folder)
    from_cache = manifest is not None
    if manifest is None:
        job.build(folder)
        manifest = pair_store.read_manifest(folder)
    if manifest is None:
        raise StorageError(f"the tokenized data just written to {folder} read back differently; check that disk.")
    report = DataReport(
        **manifest["report"] | {"unread_columns": tuple(manifest["report"]["unread_columns"])},
        refused=pair_store.read_refused(folder),
        from_cache=from_cache,
        refused_file=folder / pair_store.REFUSED_FILE,
    )
    report.check(bad_rows)
    return folder, report, manifest["fingerprint"]


class Prompted(Protocol):
    """A sample of which the beginning is given."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...


def split_by_prompt(
    dataset: Sequence[Prompted], fraction: float, seed: int, max_pairs: int | None = None
) -> tuple[list[int], list[int]]:
    """Divide the samples into indices to train on and to evaluate on, all of one prompt on the same side.

    Prompts are taken for evaluation in the order of a seeded hash while they fit into `fraction` of the samples
    (and `max_pairs`), so the same data and seed give the same division on any machine.

    Raises:
        UsageError: when `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the fraction to evaluate on is {fraction}; it must be at least 0 and below 1.")
    groups: dict[bytes, list[int]] = {}
    for index, sample in enumerate(dataset):
        ids = np.asarray(sample.prompt_ids, np.int32).tobytes()
        groups.setdefault(hashlib.sha256(b"%d:" % seed + ids).digest(), []).append(index)
    room = round(fraction * len(dataset))
    room = room if max_pairs is None else min(room, max_pairs)
    evaluated: set[int] = set()
    for _, members in sorted(groups.items()):
        if len(evaluated) + len(members) <= room:
            evaluated.update(members)
    return [i for i in range(len(dataset)) if i not in evaluated], sorted(evaluated)


def _check_options(bad_rows: str, max_samples: int | None) -> None:
    if bad_rows not in ("fail", "skip"):
        raise UsageError(f"--bad_rows {bad_rows!r} is not known; choose fail or skip.")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"--max_samples {max_samples} leaves no data; give at least 1, or leave it out for all.")
