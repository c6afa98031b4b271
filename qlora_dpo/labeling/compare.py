"""`data compare-labels`: how far two labellings of the same answers agree, all in all and by category."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_dpo.config.data import CompareLabelsOptions
from qlora_dpo.data.files.readers import Row
from qlora_dpo.data.files.sources import read_rows
from qlora_dpo.data.formats import ColumnNames, parse_row
from qlora_dpo.data.preferences import PreferencePair, RefusedRow, RowError
from qlora_dpo.errors import DataError
from qlora_dpo.labeling.agreement import cohen_kappa
from qlora_dpo.labeling.candidates import blind_candidates, format_of
from qlora_dpo.labeling.records import Verdict, majority, read_verdicts

TIE = "tie"


@dataclass(frozen=True, slots=True)
class Labelling:
    """Which answer is the chosen one, by the key of the answers."""

    name: str
    labels: dict[str, str]
    """first, second, third ... in the order in which the labeller got the answers, or tie."""
    categories: dict[str, str]
    """Where they are known: a record holds none, pairs do."""
    refused: tuple[RefusedRow, ...] = ()


def compare_labels(options: CompareLabelsOptions) -> None:
    """Print the agreement of two labellings.

    Raises:
        DataError: one of them is not readable, or they have nothing in common.
        StorageError, UsageError: as `read_rows`.
    """
    first, second = read_labelling(options.first), read_labelling(options.second)
    print("\n".join(comparison(first, second)))


def comparison(first: Labelling, second: Labelling) -> list[str]:
    """The lines of the report.

    Raises:
        DataError: they have no answers in common.
    """
    shared = [key for key in first.labels if key in second.labels]
    if not shared:
        raise DataError(
            f"{first.name} and {second.name} have no answers in common; compare labels of the same candidates."
        )
    ours, theirs = [first.labels[key] for key in shared], [second.labels[key] for key in shared]
    lines = [
        *_account("first: ", first, len(shared)),
        *_account("second:", second, len(shared)),
        f"both:   {len(shared):,} labels, {_agreement(ours, theirs)}",
        "",
        *_confusion(ours, theirs),
    ]
    by_category: dict[str, list[int]] = defaultdict(list)
    categories = second.categories | first.categories
    for number, key in enumerate(shared):
        by_category[categories.get(key, "(no category)")].append(number)
    if categories:
        width = max(map(len, by_category))
        lines += ["", "by category:"]
        for name, numbers in sorted(by_category.items()):
            agreement = _agreement([ours[n] for n in numbers], [theirs[n] for n in numbers])
            lines.append(f"  {name:{width}}  {len(numbers):>6,} labels, {agreement}")
    return lines


def read_labelling(source: str) -> Labelling:
    """The labels of a record, or of pairs of any format.

    Rows that are no pairs are kept apart, to be counted.

    Raises:
        DataError: a line of a record is no verdict.
        StorageError, UsageError: as `read_rows`.
    """
    if source.endswith(".labels.jsonl"):
        return _of_record(source)
    form, rows = format_of(read_rows(source), ColumnNames())
    refused: list[RefusedRow] = []
    labels: dict[str, str] = {}
    categories: dict[str, str] = {}
    for row in rows:
        try:
            key, chosen, pair = _of_pair(row, form)
        except RowError as error:
            refused.append(error.refused(row.origin))
            continue
        labels[key] = _place(chosen)
        if pair.category is not None:
            categories[key] = pair.category
    return Labelling(source, labels, categories, tuple(refused))


def _account(place: str, labelling: Labelling, shared: int) -> list[str]:
    labels = len(labelling.labels)
    lines = [f"{place} {labelling.name}, {labels:,} labels, {labels - shared:,} only there"]
    kinds = Counter(row.kind for row in labelling.refused)
    lines += [f"        {count:,} rows are no pairs: {kind}" for kind, count in kinds.most_common()]
    return lines


def _of_record(source: str) -> Labelling:
    by_key: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in read_verdicts(Path(source)).values():
        by_key[verdict.key].append(verdict)
    return Labelling(source, {key: _place(majority(found).chosen) for key, found in by_key.items()}, {})


def _of_pair(row: Row | RefusedRow, form: str) -> tuple[str, int, PreferencePair]:
    """Key, number of the chosen answer, and pair: as a labeller wrote them, or as one would get the pair."""
    if isinstance(row, RefusedRow):
        raise RowError(row.field, row.reason)
    parsed = parse_row(form, row.values, ColumnNames(), row.origin)
    pair = parsed.pair
    label = row.values.get("label")
    if isinstance(label, dict) and isinstance(label.get("key"), str) and isinstance(label.get("chosen"), int):
        return label["key"], label["chosen"], pair
    item = blind_candidates(parsed)
    return item.key, item.answers.index(pair.chosen), pair


def _place(chosen: int | None) -> str:
    if chosen is None:
        return TIE
    return ("first", "second", "third")[chosen] if chosen < 3 else f"{chosen + 1}th"


def _agreement(ours: Sequence[str], theirs: Sequence[str]) -> str:
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    kappa = cohen_kappa(ours, theirs)
    value = "not defined (one label only)" if kappa is None else f"{kappa:.2f}"
    return f"{equal / len(ours):.1%} equal ({equal:,}), Cohen's kappa {value}"


def _confusion(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    counts = Counter(zip(ours, theirs, strict=True))
    used = {*ours, *theirs, "first", "second", TIE}
    names = [name for name in map(_place, range(len(used) + 9)) if name in used] + [TIE]
    head = "  ".join(f"{name:>8}" for name in names)
    lines = [f"{'':10}  second says", f"{'first says':10}  {head}"]
    for mine in names:
        cells = "  ".join(f"{counts[mine, other]:>8,}" for other in names)
        lines.append(f"{mine:>10}  {cells}")
    return lines
