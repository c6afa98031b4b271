"""Where the prompts of a comparison come from: a file, the pairs that a run held out, or the built-in set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from eval.options import CompareOptions
from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.data.files.readers import Row
from qlora_dpo.data.files.sources import read_rows
from qlora_dpo.data.formats import detect_format, parse_row
from qlora_dpo.data.linting.lint import kept_texts, tokenized_source
from qlora_dpo.data.preferences import ColumnNames, PreferencePair, RefusedRow, RowError
from qlora_dpo.errors import DataError, UsageError
from qlora_dpo.labeling.prompts import PromptRow, load_prompts
from qlora_dpo.training.data import TrainingData, load_training_data

BUILT_IN_FILE = Path(__file__).with_name("builtin_prompts.jsonl")
HELD_OUT, BUILT_IN = "held_out", "built_in"


@dataclass(frozen=True)
class Prompts:
    """Prompts with what is known of their answers."""

    source: str
    rows: Sequence[PromptRow]
    facts: dict[int, str]
    """By the number of the row."""
    chosen: int = 0
    """How many reference answers are the chosen ones of pairs."""

    def first(self, count: int | None) -> Prompts:
        """Only the first of them."""
        return Prompts(self.source, self.rows[:count], self.facts, min(self.chosen, len(self.rows[:count])))


def load(options: CompareOptions, settings: dict[str, Any], tokenizer: Any) -> Prompts:
    """The prompts that the options name; `settings` are those of the adapter's run.

    Raises:
        DataError, StorageError, UsageError: there are none, or they cannot be used.
    """
    holds_out = settings.get("dataset") is not None and settings.get("objective", "dpo") == "dpo"
    source = options.prompts or (HELD_OUT if holds_out and _holds_out(settings) else BUILT_IN)
    if source == HELD_OUT:
        if not holds_out:
            raise UsageError(
                f"--prompts held_out: {options.adapter} is of no run that held out pairs. Name a file of prompts, or "
                "take --prompts built_in."
            )
        found = _held_out(options, settings, tokenizer)
    else:
        found = _of_rows(options, str(BUILT_IN_FILE) if source == BUILT_IN else source)
    return found.first(options.max_prompts)


def _holds_out(settings: dict[str, Any]) -> bool:
    return bool(settings.get("eval_dataset") or settings.get("eval_split") or settings.get("eval_fraction"))


def _held_out(options: CompareOptions, settings: dict[str, Any], tokenizer: Any) -> Prompts:
    """The pairs that the run held out, read as it read them."""
    known = {option.name: settings[option.name] for option in fields(DataOptions) if option.name in settings}
    data = load_training_data(DataOptions(**known), tokenizer, int(settings.get("seed", 42)))
    if not data.held_out:
        raise UsageError(
            f"--prompts held_out: the run of {options.adapter} held out no pairs. Name a file of prompts, or take "
            "--prompts built_in."
        )
    pairs = list(_texts(data))
    rows = [
        PromptRow(number, pair.prompt, pair.category, pair.chosen, pair.origin) for number, pair in enumerate(pairs)
    ]
    return Prompts(HELD_OUT, rows, _facts_at(settings, options.fact_key, rows), len(rows))


def _texts(data: TrainingData) -> Iterator[PreferencePair]:
    """The held-out pairs as texts, in the order of their places."""
    wanted, start = set(data.held_out), 0
    for source in data.sources:
        assert isinstance(source, PairDataset)
        if any(start <= place < start + len(source) for place in wanted):
            yield from (pair for place, pair in kept_texts(tokenized_source(source)) if start + place in wanted)
        start += len(source)


def _facts_at(settings: dict[str, Any], key: str, rows: Sequence[PromptRow]) -> dict[int, str]:
    """The facts of held-out rows, where these stand in a file of their own."""
    source = settings.get("eval_dataset")
    if source is None or not Path(source).expanduser().is_file():
        return {}
    facts = {row.origin: row.values.get(key) for row in read_rows(str(source)) if isinstance(row, Row)}
    found = {row.number: facts.get(row.origin) for row in rows}
    return {number: fact for number, fact in found.items() if isinstance(fact, str) and fact.strip()}


def _of_rows(options: CompareOptions, source: str) -> Prompts:
    """The prompts of a source; of pairs the chosen answer is the reference answer."""
    rows = load_prompts(
        source,
        options.bad_rows,
        prompt_key=options.prompt_key,
        reference_answer_key=options.reference_answer_key,
        category_key=options.category_key,
    )
    if not rows:
        raise DataError(f"--prompts {source} holds no prompts. Name a file with a row per prompt.")
    chosen, facts = _of_pairs(source, options)
    filled = [
        row if row.reference_answer is not None or row.number not in chosen else _with(row, chosen[row.number])
        for row in rows
    ]
    count = sum(before is not after for before, after in zip(rows, filled, strict=True))
    name = BUILT_IN if source == str(BUILT_IN_FILE) else source
    return Prompts(name, filled, facts, count)


def _with(row: PromptRow, reference_answer: str) -> PromptRow:
    return PromptRow(row.number, row.prompt, row.category, reference_answer, row.origin)


def _of_pairs(source: str, options: CompareOptions) -> tuple[dict[int, str], dict[int, str]]:
    """By the numbers of their rows, the chosen answers of those that are pairs, and the facts."""
    names = ColumnNames(prompt=options.prompt_key)
    chosen: dict[int, str] = {}
    facts: dict[int, str] = {}
    for number, row in enumerate(read_rows(source)):
        if isinstance(row, RefusedRow):
            continue
        fact = row.values.get(options.fact_key)
        if isinstance(fact, str) and fact.strip():
            facts[number] = fact
        try:
            chosen[number] = parse_row(detect_format(row.values, names), row.values, names, row.origin).pair.chosen
        except (RowError, UsageError):  # a prompt, not a pair
            continue
    return chosen, facts
