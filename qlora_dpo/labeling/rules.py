"""Labels by rules: the weighted mean of the scores of a list of rules says which answer is better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qlora_dpo.config.labeling import RulesOptions
from qlora_dpo.errors import UsageError
from qlora_dpo.labeling.records import Candidates, Verdict, finish, load_candidates, now, open_record, pending
from qlora_dpo.labeling.rules_file import WeightedRule, read_rules

_AT_ONCE = 100  # verdicts that are put on the disk together


def label_by_rules(options: RulesOptions) -> None:
    """Score every answer and write the pairs.

    Raises:
        DataError, StorageError, UsageError: the rules, the candidates or the record cannot be used.
    """
    from tqdm import tqdm

    if not 0 <= options.min_margin <= 1:
        raise UsageError(f"--min_margin {options.min_margin}: scores are between 0 and 1, so it must be too.")
    rules, version = read_rules(options.rules)
    version = f"{version} min_margin={options.min_margin:g}"
    candidates = load_candidates(options.candidates, options.bad_rows)
    record = open_record(options.output, "rules", options.candidates)
    items = pending(candidates, record.verdicts(), version=version)
    with tqdm(total=len(items), desc="scoring", unit=" sets", delay=1, leave=False) as bar:
        for start in range(0, len(items), _AT_ONCE):
            chunk = items[start : start + _AT_ONCE]
            record.add(*(decide(item, rules, options.min_margin, version) for item in chunk))
            bar.update(len(chunk))
    verdicts = record.verdicts()
    print(finish(options.output, candidates, verdicts))
    by_rule = [verdicts[item.key, None].detail["rules"] for item in candidates]
    for name, count in Counter(name for scores in by_rule for name in scores if scores[name] is None).items():
        print(f"  rule {name} was left out for {count:,} of them: they have no reference_answer or no language")


def decide(item: Candidates, rules: Sequence[WeightedRule], min_margin: float, version: str) -> Verdict:
    """The verdict of the rules: the best answer against the worst.

    A rule that has nothing to say about a row is left out for it. Confidence is 0.5 + margin / 2: 1 where one answer is
    best and another worst by every rule.
    """
    by_rule: dict[str, list[float] | None] = {}
    for rule in rules:
        found = [score for answer in item.answers if (score := rule.rule(item, answer)) is not None]
        by_rule[rule.name] = found or None
    speaking = [(rule.weight, known) for rule in rules if (known := by_rule[rule.name])]
    total = sum(weight for weight, _ in speaking) or 1.0
    scores = tuple(
        sum(weight * found[number] for weight, found in speaking) / total for number in range(len(item.answers))
    )
    chosen, rejected = scores.index(max(scores)), scores.index(min(scores))
    margin = scores[chosen] - scores[rejected]
    is_tie = margin == 0 or margin < min_margin
    return Verdict(
        key=item.key, chosen=None if is_tie else chosen, rejected=None if is_tie else rejected, scores=scores,
        confidence=1.0 if is_tie else min(1.0, 0.5 + margin / 2), method="rules", version=version, time=now(),
        detail={"rules": by_rule},
    )  # fmt: skip
