"""How far labellers agree, beyond what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from qlora_dpo.labeling.records import Verdicts


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of the annotators of one record, on what at least two of them have labelled."""

    annotators: tuple[str, ...]
    sets: int
    equal: int
    """Sets of answers on which all who labelled it agree."""
    statistic: str
    """Cohen's kappa or Krippendorff's alpha."""
    value: float | None
    """1: always; 0: as often as by chance. None where it is not defined: everybody always says the same."""

    def __str__(self) -> str:
        value = "not defined" if self.value is None else f"{self.value:.2f}"
        return (
            f"{len(self.annotators)} annotators ({', '.join(self.annotators)}) agree on {self.equal} of {self.sets} "
            f"sets of answers, {self.statistic} {value}"
        )


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa (1960) of two labellings, (p_o - p_e) / (1 - p_e); None where only one label is used."""
    count = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True))
    ours, theirs = Counter(first), Counter(second)
    expected = sum(ours[label] * theirs[label] for label in ours)
    if expected == count * count:
        return None
    return (observed / count - expected / count**2) / (1 - expected / count**2)


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal labels: `units` has those that each thing got; None where only one is used."""
    import krippendorff

    units = [unit for unit in units if len(unit) > 1]  # one label agrees with nothing
    labels = sorted({label for unit in units for label in unit}, key=repr)
    if len(labels) < 2:
        return None
    counts = [[Counter(unit)[label] for label in labels] for unit in units]
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def agreement_of(verdicts: Verdicts) -> Agreement | None:
    """Agreement of the annotators of a record; None where no two of them have labelled the same answers."""
    by_key: dict[str, dict[str, Hashable]] = {}
    for (key, annotator), verdict in verdicts.items():
        by_key.setdefault(key, {})[annotator or ""] = (verdict.chosen, verdict.rejected)
    shared = [labels for labels in by_key.values() if len(labels) > 1]
    if not shared:
        return None
    names = tuple(sorted({name for labels in shared for name in labels}))
    equal = sum(len(set(labels.values())) == 1 for labels in shared)
    if len(names) == 2:
        value = cohen_kappa([labels[names[0]] for labels in shared], [labels[names[1]] for labels in shared])
        return Agreement(names, len(shared), equal, "Cohen's kappa", value)
    value = krippendorff_alpha([list(labels.values()) for labels in shared])
    return Agreement(names, len(shared), equal, "Krippendorff's alpha", value)
