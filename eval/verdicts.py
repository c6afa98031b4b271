"""Who says which answer is better: rules that hold them against the reference answer, a reward model, a judge.

Each method's verdicts are kept as they are made, so that nobody is asked twice; one that decides otherwise now (another
model, another margin) has another version, and decides again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.answers import Row, Verdict, VerdictFile, Winner
from eval.options import VerdictOptions
from eval.rates import contains
from qlora_dpo.config.labeling import EndpointOptions, refuse_ignored
from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.data.report import listed
from qlora_dpo.endpoint import Endpoint
from qlora_dpo.errors import UsageError
from qlora_dpo.labeling.call_cache import CachedChat, CallCache
from qlora_dpo.labeling.judge import HIGHEST_SCORE, MODES, Judge
from qlora_dpo.labeling.records import Candidates, now
from qlora_dpo.labeling.records import Verdict as Opinion
from qlora_dpo.labeling.rule_kinds import chrf, token_f1

CALLS = "calls.sqlite"  # of the judge, beside the verdicts
RULES_VERSION = 1  # raise it when a rule would score otherwise
REWARD_BATCH = 16  # answers that a reward model scores at once

Score = Callable[[str, str, str | None], float]
"""(answer, reference answer, fact) to a score from 0 to 1."""


def _exact(answer: str, reference: str, fact: str | None) -> float:
    return float(contains(answer, fact or reference))


RULES: dict[str, Score] = {
    "rule:chrf": lambda answer, reference, _: chrf(answer, reference),
    "rule:token_f1": lambda answer, reference, _: token_f1(answer, reference),
    "rule:exact": _exact,
}
REWARD_MODEL, JUDGE = "reward_model", "judge"


def give_verdicts(
    rows: Sequence[Row], record: VerdictFile, options: VerdictOptions, server: EndpointOptions, folder: Path,
    *, use_cpu: bool,
) -> dict[str, Any]:  # fmt: skip
    """Add what is missing of the verdicts by rules and by whoever is named; returns what to note about them.

    Raises:
        EndpointError, ModelError, StorageError, UsageError: the judge or the reward model cannot be asked.
    """
    by_rules(rows, record, options.tie_margin)
    noted: dict[str, Any] = {}
    if options.reward_model:
        noted[REWARD_MODEL] = by_reward_model(rows, record, options, use_cpu)
    if server.endpoint:
        noted[JUDGE] = by_judge(rows, record, options, server, folder)
    return noted


def check_verdicts(options: VerdictOptions, server: EndpointOptions) -> None:
    """Refuse what cannot work, or would be ignored.

    Raises:
        UsageError: naming each such option.
    """
    if not 0 <= options.tie_margin <= 1:
        raise UsageError(f"--tie_margin {options.tie_margin}: scores are between 0 and 1, so it must be too.")
    if not 0 <= options.judge_tie_margin <= HIGHEST_SCORE:
        raise UsageError(f"--judge_tie_margin {options.judge_tie_margin}: must be between 0 and {HIGHEST_SCORE:g}.")
    if options.judge_max_tokens < 1:
        raise UsageError(f"--judge_max_tokens {options.judge_max_tokens}: must be above 0.")
    if not options.reward_model:
        refuse_ignored(options, "there is no --reward_model", "reward_model_in_4bit")
    if not server.endpoint:
        refuse_ignored(server, "there is no --endpoint")
        refuse_ignored(
            options, "there is no --endpoint, so no judge", "judge", "judge_tie_margin", "judge_max_tokens", "canaries"
        )
    elif options.judge == "gsb":
        refuse_ignored(options, "--judge gsb has no scores", "judge_tie_margin")


def by_rules(rows: Sequence[Row], record: VerdictFile, tie_margin: float) -> None:
    """Hold both answers against the reference answer; rows without one get no verdict."""
    version = f"{RULES_VERSION} tie_margin {tie_margin:g}"
    judgeable = [row for row in rows if row.reference_answer]
    made = []
    for method, score in RULES.items():
        for row in _pending(judgeable, record, method, version):
            reference = row.reference_answer or ""
            scores = score(row.before.text, reference, row.fact), score(row.after.text, reference, row.fact)
            made.append(_verdict(row, method, version, scores, tie_margin=tie_margin))
    if made:
        record.add(*made)


def by_reward_model(rows: Sequence[Row], record: VerdictFile, options: VerdictOptions, use_cpu: bool) -> dict[str, Any]:
    """Let a sequence classifier score both answers.

    Raises:
        ModelError, ResourceError, StorageError, UsageError: it cannot be used.
    """
    from qlora_dpo.labeling.reward_model import decide
    from qlora_dpo.labeling.reward_scorer import load_reward_scorer

    scorer, version = load_reward_scorer(
        str(options.reward_model), load_in_4bit=options.reward_model_in_4bit, use_cpu=use_cpu
    )
    left = _pending(rows, record, REWARD_MODEL, version)
    for start in tqdm(range(0, len(left), REWARD_BATCH), desc="reward model", delay=1, leave=False):
        batch = left[start : start + REWARD_BATCH]
        encoded = [scorer.encode(row.prompt, answer.text) for row in batch for answer in (row.before, row.after)]
        rewards = scorer.score(encoded, REWARD_BATCH)
        made = []
        for row, before, after in zip(batch, rewards[::2], rewards[1::2], strict=True):
            opinion = decide(_candidates(row), (before, after), 0.0, version)
            made.append(_verdict(row, REWARD_MODEL, version, (before, after), {"confidence": opinion.confidence}))
        record.add(*made)
    if scorer.truncated:
        print(f"truncated: {scorer.truncated:,} answers with their prompts, for the reward model (the end was kept)")
    return {"model": options.reward_model, "version": version}


def by_judge(
    rows: Sequence[Row], record: VerdictFile, options: VerdictOptions, server: EndpointOptions, folder: Path
) -> dict[str, Any]:
    """Ask a served model; equal answers are a tie without asking.

    Raises:
        EndpointError, StorageError: no server answers, or the disk refuses.
    """
    endpoint = Endpoint(
        server.endpoint, server.endpoint_model or "", server.concurrency, server.timeout, server.retries
    )
    chat = CachedChat(endpoint, CallCache(folder / CALLS))
    judge = Judge(chat, options.judge, options.judge_tie_margin, options.judge_max_tokens)
    noted: dict[str, Any] = {"model": server.endpoint_model, "mode": options.judge, "version": judge.version}
    missing = [(row, _candidates(row)) for row in _pending(rows, record, JUDGE, judge.version)]
    judgeable = [(row, item) for row, item in missing if judge.can_judge(item)]
    left = [(row, item) for row, item in judgeable if item.answers[0] != item.answers[1]]
    same = [row for row, item in judgeable if item.answers[0] == item.answers[1]]
    if same:
        record.add(*(_verdict(row, JUDGE, judge.version, None, {"same_text": True}) for row in same))
    refused: list[RefusedRow] = []
    try:
        if options.canaries:
            noted["canaries"] = judge.try_to_steer()
            print(noted["canaries"])
        if left:
            calls = len(left) * MODES[options.judge].calls(2)
            print(
                f"{len(left):,} prompts with their answers go to {' and '.join(server.endpoint)}, in {calls:,} calls."
            )
            refused = _asked(judge, endpoint, left, record)
    finally:
        chat.cache.close()
        print(chat.summary())
    if refused:
        print(f"{len(refused):,} rows have no verdict of the judge:\n{listed(refused)}")
    return noted | {"without_verdict": len(refused) + len(missing) - len(judgeable)}


def _asked(
    judge: Judge, endpoint: Endpoint, left: Sequence[tuple[Row, Candidates]], record: VerdictFile
) -> list[RefusedRow]:
    """Keep the judge's verdicts as they come; returns the rows that the server does not take."""

    async def opinion(number: int) -> Opinion | RefusedRow:
        return await judge(left[number][1])

    given: list[Opinion] = []
    refused: list[RefusedRow] = []
    results = endpoint.results(range(len(left)), opinion)
    for number, found in tqdm(results, desc="judging", total=len(left), delay=1, leave=False):
        if isinstance(found, RefusedRow):
            refused.append(found)
            continue
        given.append(found)
        detail = found.detail | {"confidence": found.confidence}
        scores = (found.scores[0], found.scores[1]) if len(found.scores) == 2 else None
        winner: Winner = "tie" if found.is_tie else "after" if found.chosen == 1 else "before"
        record.add(Verdict(left[number][0].id, JUDGE, winner, scores, detail, judge.version, now()))
    print(judge.account(given))
    return refused


def _pending(rows: Iterable[Row], record: VerdictFile, method: str, version: str) -> list[Row]:
    """The rows without a verdict of this method and version."""
    known = {found.id for found in record.verdicts() if (found.method, found.version) == (method, version)}
    return [row for row in rows if row.id not in known]


def _candidates(row: Row) -> Candidates:
    return Candidates(row.prompt, (row.before.text, row.after.text), row.category, row.reference_answer, row.origin)


def _verdict(
    row: Row, method: str, version: str, scores: tuple[float, float] | None, detail: dict[str, Any] | None = None,
    tie_margin: float = 0.0,
) -> Verdict:  # fmt: skip
    """What these scores say; a tie without any."""
    difference = scores[1] - scores[0] if scores else 0.0
    winner: Winner = "tie" if abs(difference) <= tie_margin else "after" if difference > 0 else "before"
    return Verdict(row.id, method, winner, scores, detail or {}, version, now())
