"""The rows of `score`: every pair as it was read, with its scores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.data.files.readers import file_kind
from qlora_dpo.data.files.writers import row_writer
from qlora_dpo.data.linting.lint import kept_texts, tokenized_source
from qlora_dpo.data.linting.preview import token_text
from qlora_dpo.data.preferences import PreferencePair
from qlora_dpo.data.progress import with_progress
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.files.guard import check_output, json_with
from qlora_dpo.reference.fill import keys_of
from qlora_dpo.reference.implicit_rewards import Scored
from qlora_dpo.reference.store import Logps, ModelRows
from qlora_dpo.scoring.report import summary_path
from qlora_dpo.terminal import visible
from qlora_dpo.training.data import TrainingData

KINDS = (".jsonl", ".jsonl.gz", ".parquet")
SHOWN = 10  # rows on the terminal
LONGEST = 100  # characters of a text there
_DIGITS = 6  # of a token's log-prob in a file
_IS_SUMMARY = json_with("adapter", "margin_of", "flipped_labels")


def refuse_output(output: Path, dataset: str) -> None:
    """Find out before anything is computed whether the rows can be written.

    Raises:
        UsageError: the name says no kind of file, or there is a file already, or it is where the pairs are.
        StorageError: nothing can be written there.
    """
    if file_kind(output) not in KINDS:
        raise UsageError(f"--output {output}: its name must end with one of {', '.join(KINDS)}.")
    check_output(output, inputs=[dataset], hint=": what was computed for it is in the store")
    check_output(summary_path(output), inputs=[dataset], is_own=_IS_SUMMARY, option=None)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write", str(output.parent))
    except OSError as error:
        raise StorageError(
            f"--output {output} cannot be written: {error.strerror or error}. Name a file where you may write."
        ) from error


class ScoredRows:
    """Pairs as texts, with their scores."""

    def __init__(self, data: TrainingData, scored: Scored, logps: Mapping[str, ModelRows], tokenizer: Any) -> None:
        """`logps` has the log-probs per token, by what the model is called."""
        self._data, self._scored, self._logps = data, scored, logps
        self._columns = scored.columns()
        self._token_text = cache(partial(token_text, tokenizer))

    def write(self, output: Path, worst: int | None, *, per_token: bool) -> list[PreferencePair]:
        """Write all rows in their order, or only the `worst` most suspicious ones, the worst first; returns those to
        show.

        Raises:
            StorageError: the disk refuses, or the store has lost a row.
            DataError: the data set has changed while it was read.
        """
        order = self._scored.most_suspicious.tolist()
        wanted = set(order[: max(SHOWN, worst or 0)])
        kept: dict[int, PreferencePair] = {}
        is_text = True
        for place, text in self._texts("reading"):
            is_text = is_text and isinstance(text.prompt, str)
            if place in wanted:
                kept[place] = text
        texts = self._texts("writing") if worst is None else ((place, kept[place]) for place in order[:worst])
        with row_writer(output, self._example(is_text, per_token)) as add:
            for place, text in texts:
                add(self._row(place, text, is_text) | (self._per_token(place) if per_token else {}))
        return [kept[place] for place in order[:SHOWN]]

    def _texts(self, what: str) -> Iterator[tuple[int, PreferencePair]]:
        """All pairs with their places."""
        start = 0
        for source in self._data.sources:
            assert isinstance(source, PairDataset)
            for place, text in with_progress(kept_texts(tokenized_source(source)), what):
                yield start + place, text
            start += len(source)

    def _row(self, place: int, text: PreferencePair, is_text: bool) -> dict[str, Any]:
        return {
            # A file has one format: where some prompts are messages, a text is written as one user message.
            "prompt": text.prompt if is_text else list(text.messages),
            "chosen": text.chosen,
            "rejected": text.rejected,
            "category": text.category,
            "confidence": text.confidence,
            "origin": text.origin,
            "margin_of": self._scored.margin_of,
            **{name: values[place].item() for name, values in self._columns.items()},
        }

    def _per_token(self, place: int) -> dict[str, Any]:
        """The tokens of both answers with the log-prob of each."""
        pair, found = self._data.pairs[place], {}
        keys = keys_of(pair)
        values = {name: rows.get(list(dict.fromkeys(keys))) for name, rows in self._logps.items()}
        for side, key, ids in zip(("chosen", "rejected"), keys, (pair.chosen_ids, pair.rejected_ids), strict=True):
            found[f"{side}_token_ids"] = list(ids)
            found[f"{side}_token_texts"] = [self._token_text(id_) for id_ in ids]
            for name, rows in values.items():
                if key not in rows:
                    raise StorageError(f"{self._logps[name].store.path} has lost rows. Run the same command again.")
                found[f"{name}_{side}_token_logps"] = _rounded(rows[key])
        return found

    def _example(self, is_text: bool, per_token: bool) -> dict[str, Any]:
        """A row with every column."""
        example = PreferencePair("w" if is_text else ({"role": "user", "content": "w"},), "w", "w", category="w")
        return self._row(0, example, is_text) | (self._per_token(0) if per_token else {})


def worst_lines(texts: Sequence[PreferencePair], scored: Scored) -> list[str]:
    """The most suspicious rows, shortened."""
    lines = _heading(len(texts), scored)
    for rank, (place, text) in enumerate(zip(scored.most_suspicious.tolist(), texts, strict=False), 1):
        category = f" ({_short(text.category)})" if text.category else ""
        lines.append(f"{rank:4}  margin {scored.margins[place]:+.3f}  {visible(text.origin)}{category}")
        parts = {"prompt": text.messages[-1]["content"], "chosen": text.chosen, "rejected": text.rejected}
        lines += [f"      {name:8}  {_short(part)}" for name, part in parts.items()]
    return lines


def _heading(shown: int, scored: Scored) -> list[str]:
    if not scored.knows_nothing:
        return [f"The {shown} most suspicious rows (lowest margin; all have their suspicion_rank):"]
    agrees, (low, high) = (scored.margins > 0).mean(), scored.accuracy_interval
    return [
        f"The adapter agrees with {agrees:.0%} of these labels (95 % interval {low:.0%} to {high:.0%}), which is not "
        "above chance: it can know nothing about which of them are wrong.",
        f"The {shown} rows with the lowest margin, which is no reason to suspect them:",
    ]


def _rounded(values: Logps) -> list[float]:
    found: list[float] = np.round(values.astype(np.float64), _DIGITS).tolist()
    return found


def _short(text: str) -> str:
    """A text that a terminal shows in part of a line and does not obey."""
    return visible(text if len(text) <= LONGEST else text[: LONGEST - 3] + "...")
