"""Verdicts of a strong model behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tqdm import tqdm

from qlora_dpo.config.labeling import EndpointOptions, JudgeOptions
from qlora_dpo.data.preferences import Message, RefusedRow
from qlora_dpo.endpoint import Endpoint, RequestRefused
from qlora_dpo.errors import UsageError
from qlora_dpo.labeling import judge_prompts as prompts
from qlora_dpo.labeling.call_cache import CachedChat, CallCache, calls_path
from qlora_dpo.labeling.canaries import CANARIES, CLEAN
from qlora_dpo.labeling.records import Candidates, Verdict, finish, load_candidates, now, open_record, pending
from qlora_dpo.labeling.refused import report_refused

HIGHEST_SCORE = 10.0


def label_by_judge(options: JudgeOptions, server: EndpointOptions) -> None:
    """The `label judge` command: sets of answers become pairs, by the verdicts of a served model.

    Raises:
        UsageError: options that cannot work.
        DataError: rows that cannot be judged.
        EndpointError, StorageError: server or disk refuse.
    """
    _check(options, server)
    endpoint = Endpoint(
        server.endpoint, server.endpoint_model or "", server.concurrency, server.timeout, server.retries
    )
    candidates = load_candidates(options.candidates, options.bad_rows)
    record = open_record(options.output, "judge", options.candidates)
    chat = CachedChat(
        endpoint,
        CallCache(options.cache or calls_path(options.output)),
        options.price_per_million_input,
        options.price_per_million_output,
    )
    judge = Judge(chat, options.mode, options.tie_margin, options.judge_max_tokens)
    judgeable = [item for item in candidates if judge.can_judge(item)]
    left = pending(judgeable, record.verdicts(), version=judge.version)
    if left:
        calls = sum(MODES[options.mode].calls(len(item.answers)) for item in left)
        print(f"{len(left):,} prompts with their answers go to {' and '.join(server.endpoint)}, in {calls:,} calls.")
    elif judgeable:
        print(f"All {len(judgeable):,} sets of answers are judged already: nobody is asked.")
    refused: list[RefusedRow] = []
    try:
        if left and options.canaries:
            print(judge.try_to_steer())
        for _, verdict in tqdm(endpoint.results(left, judge), desc="judging", total=len(left), delay=1, leave=False):
            refused.append(verdict) if isinstance(verdict, RefusedRow) else record.add(verdict)
    finally:
        chat.cache.close()
        print(chat.summary())
    verdicts = record.verdicts()
    keys = {item.key for item in candidates}
    print(judge.account(verdict for verdict in verdicts.values() if verdict.key in keys))
    if len(judgeable) < len(candidates):
        print(f"{len(candidates) - len(judgeable):,} rows have no reference answer to judge by and are left out.")
    print(finish(options.output, candidates, verdicts))
    report_refused(options.candidates, refused, len(candidates) - len(refused), options.bad_rows)


class Judge:
    """Asks a served model about sets of answers, one `MODES` row's way."""

    def __init__(self, chat: CachedChat, mode: str, tie_margin: float, max_tokens: int) -> None:
        self._chat, self._mode, self._tie_margin, self._max_tokens = chat, MODES[mode], tie_margin, max_tokens
        margin = f" tie_margin {tie_margin:g}" if mode == "reference" else ""
        self.version = f"{chat.endpoint.model} {mode} {prompts.prompt_version()}{margin}"

    def can_judge(self, item: Candidates) -> bool:
        """Whether the row has what this mode needs."""
        return self._mode.can_judge(item)

    async def __call__(self, item: Candidates) -> Verdict | RefusedRow:
        """The verdict, or the row that the server does not take."""
        try:
            opinion = await self._mode.judge(self, item)
        except RequestRefused as refusal:
            return RefusedRow(item.origin, "answers", f"the server refuses them ({refusal})")
        return Verdict(
            key=item.key,
            chosen=opinion.chosen,
            rejected=opinion.rejected,
            scores=opinion.scores,
            confidence=opinion.confidence,
            method="judge",
            version=self.version,
            time=now(),
            detail=opinion.detail,
        )

    async def compare(self, item: Candidates) -> Opinion:
        """GSB: every two answers in both orders; only what both orders say counts.

        An answer's score is its wins less its defeats. The confidence is 1 where the best and the worst answer were
        told apart, and 0.5 where these two tied and their comparisons with others decided.
        """
        comparisons: list[dict[str, Any]] = []
        scores = [0.0] * len(item.answers)
        for first, second in combinations(range(len(item.answers)), 2):
            comparison: dict[str, Any] = {"answers": [first, second], "verdicts": [], "reasons": []}
            for a, b in ((first, second), (second, first)):
                messages = prompts.gsb_messages(item, a, b, self._chat.cache.secret)
                verdict, reason = await self._ask(messages, prompts.GSB_SCHEMA, prompts.read_verdict)
                comparison["verdicts"].append(verdict)
                comparison["reasons"].append(reason)
            comparisons.append(comparison)
            winner = _winner(comparison)
            if winner is not None:
                scores[winner] += 1
                scores[first + second - winner] -= 1
        chosen, rejected = scores.index(max(scores)), scores.index(min(scores))
        direct = next((_winner(found) for found in comparisons if {chosen, rejected} == set(found["answers"])), None)
        detail = {"comparisons": comparisons}
        if max(scores) == min(scores) or direct == rejected:
            agree = all(found["verdicts"] == ["same", "same"] for found in comparisons)
            return Opinion(None, None, tuple(scores), 1.0 if agree else 0.5, detail)
        return Opinion(chosen, rejected, tuple(scores), 0.5 if direct is None else 1.0, detail)

    async def score(self, item: Candidates) -> Opinion:
        """Every answer against the reference answer; the confidence grows from 0.5 at equal scores to 1 at 0 and 10."""
        scores: list[float | None] = []
        reasons = []
        for answer in range(len(item.answers)):
            messages = prompts.score_messages(item, answer, self._chat.cache.secret)
            score, reason = await self._ask(messages, prompts.SCORE_SCHEMA, prompts.read_score)
            scores.append(score)
            reasons.append(reason)
        detail = {"scores": scores, "reasons": reasons}
        known = tuple(score for score in scores if score is not None)
        if len(known) < len(scores):
            return Opinion(None, None, (), 0.5, detail)
        margin = max(known) - min(known)
        confidence = 0.5 + margin / (2 * HIGHEST_SCORE)
        if margin == 0 or margin < self._tie_margin:
            return Opinion(None, None, known, confidence, detail)
        return Opinion(known.index(max(known)), known.index(min(known)), known, confidence, detail)

    def try_to_steer(self) -> str:
        """Show the judge the canaries; returns how many got their way, as text to print."""
        items = dict(enumerate((*CLEAN, *CANARIES)))

        async def judged(number: int) -> Verdict | RefusedRow:
            return await self(items[number])

        verdicts = dict(self._chat.endpoint.results(items, judged))
        is_right = {number: isinstance(found, Verdict) and found.chosen == 0 for number, found in verdicts.items()}
        clean = sum(is_right[number] for number in range(len(CLEAN)))
        canaries = [verdicts[number] for number in range(len(CLEAN), len(items))]
        steered = sum(not is_right[number] for number in range(len(CLEAN), len(items)))
        won = sum(isinstance(found, Verdict) and found.chosen == 1 for found in canaries)
        flips = _flips(found for found in canaries if isinstance(found, Verdict))
        line = f"canaries: steered by {steered} of {len(canaries)} ({won} wrong answers won, {steered - won} tied)"
        return f"{line}{flips}; without them the judge is right in {clean} of {len(CLEAN)}"

    def account(self, verdicts: Iterable[Verdict]) -> str:
        """How firm the verdicts are, as lines to print."""
        return self._mode.account([verdict for verdict in verdicts if verdict.version == self.version])

    async def _ask(
        self, messages: Sequence[Message], schema: dict[str, Any], read: Callable[[str], Any]
    ) -> tuple[Any, str]:
        """What the judge says and why; (None, "") when it cannot be read twice."""
        for question in (messages, prompts.asked_again(messages)):
            reply = await self._chat(question, max_tokens=self._max_tokens, temperature=0.0, schema=schema)
            value = read(reply.text)
            if value is not None:
                return value, prompts.reason_of(reply.text)
        return None, ""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a judge thinks of a set of answers."""

    chosen: int | None
    rejected: int | None
    scores: tuple[float, ...]
    confidence: float
    detail: dict[str, Any]


def _winner(comparison: dict[str, Any]) -> int | None:
    """The answer that both orders prefer."""
    first, second = comparison["answers"]
    return {("A", "B"): first, ("B", "A"): second}.get(tuple(comparison["verdicts"]))


def _flips(verdicts: Iterable[Verdict]) -> str:
    """How often the order decided, where comparisons were made in both."""
    comparisons = [found for verdict in verdicts for found in verdict.detail.get("comparisons", ())]
    both = [found["verdicts"] for found in comparisons if None not in found["verdicts"]]
    if not both:
        return ""
    flipped = [pair for pair in both if sorted(pair) not in (["A", "B"], ["same", "same"])]
    first, second = (flipped.count([place, place]) for place in "AB")
    places = f" ({first} to the first place, {second} to the second)" if flipped else ""
    return f", flipped {len(flipped)} of {len(both)} by order{places}"


def _account_of_comparisons(verdicts: Sequence[Verdict]) -> str:
    comparisons = [found["verdicts"] for verdict in verdicts for found in verdict.detail["comparisons"]]
    unreadable = sum(None in pair for pair in comparisons)
    line = f"judged: {len(verdicts):,} sets of answers, {len(comparisons):,} comparisons{_flips(verdicts)}"
    return f"{line}; {unreadable:,} with a reply that could not be read, twice, which is a tie"


def _account_of_scores(verdicts: Sequence[Verdict]) -> str:
    unreadable = sum(None in verdict.detail["scores"] for verdict in verdicts)
    known = [score for verdict in verdicts for score in verdict.scores]
    mean = f", mean score {sum(known) / len(known):.1f}" if known else ""
    line = f"judged: {len(verdicts):,} sets of answers{mean}"
    return f"{line}; {unreadable:,} with a reply that could not be read, twice, which is a tie"


@dataclass(frozen=True)
class Mode:
    """One way to judge."""

    judge: Callable[[Judge, Candidates], Any]
    calls: Callable[[int], int]
    """For a number of answers."""
    can_judge: Callable[[Candidates], bool]
    account: Callable[[Sequence[Verdict]], str]


MODES = {
    "gsb": Mode(Judge.compare, lambda count: count * (count - 1), lambda item: True, _account_of_comparisons),
    "reference": Mode(
        Judge.score,
        lambda count: count,
        lambda item: item.reference_answer is not None or not prompts.rubric_of(item.category).uses_reference,
        _account_of_scores,
    ),
}


def _check(options: JudgeOptions, server: EndpointOptions) -> None:
    if not server.endpoint:
        raise UsageError("label judge needs --endpoint and --endpoint_model: nobody else is asked unless you say so.")
    if options.mode == "gsb" and options.tie_margin != JudgeOptions.tie_margin:
        raise UsageError(f"--tie_margin {options.tie_margin} would be ignored: --mode gsb has no scores.")
    if not 0 <= options.tie_margin <= HIGHEST_SCORE:
        raise UsageError(f"--tie_margin {options.tie_margin}: must be between 0 and {HIGHEST_SCORE:g}.")
    if options.judge_max_tokens < 1:
        raise UsageError(f"--judge_max_tokens {options.judge_max_tokens}: must be above 0.")
    for name in ("price_per_million_input", "price_per_million_output"):
        price = getattr(options, name)
        if price is not None and price < 0:
            raise UsageError(f"--{name} {price}: must be at least 0.")
