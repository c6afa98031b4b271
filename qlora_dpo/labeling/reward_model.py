"""Labels by a reward model: the answer with the highest reward against the one with the lowest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from qlora_dpo.config.labeling import RewardModelOptions
from qlora_dpo.errors import DataError, ModelError, UsageError
from qlora_dpo.labeling.records import Candidates, Record, Verdict, finish, load_candidates, now, open_record, pending
from qlora_dpo.labeling.reward_scorer import RewardScorer, load_reward_scorer

_BATCHES_AT_ONCE = 8  # that are sorted by length together; a kill costs their rewards


def label_by_reward_model(options: RewardModelOptions) -> None:
    """Score every answer and write the pairs.

    Raises:
        DataError, ModelError, ResourceError, StorageError, UsageError: model, candidates or record cannot be used.
    """
    _check(options)
    candidates = load_candidates(options.candidates, options.bad_rows)
    record = open_record(options.output, "reward_model", options.candidates)
    scorer, version = load_reward_scorer(
        options.reward_model,
        revision=options.model_revision,
        load_in_4bit=options.load_in_4bit,
        use_cpu=options.use_cpu,
        max_length=options.max_length,
        prompt_template=options.prompt_template,
    )
    version = f"{version} min_margin={options.min_margin:g}"
    if scorer.max_length < options.max_length:
        print(f"{options.reward_model} takes {scorer.max_length} tokens, so longer texts lose their beginning.")
    items = pending(candidates, record.verdicts(), version=version)
    refused = _score_all(items, scorer, record, options, version)
    if scorer.truncated:
        print(f"truncated: {scorer.truncated:,} answers with their prompts (the end was kept)")
    for reason in refused:
        print(f"left out: {reason}")
    print(finish(options.output, candidates, {key: v for key, v in record.verdicts().items() if v.version == version}))


def decide(item: Candidates, rewards: Sequence[float], min_margin: float, version: str) -> Verdict:
    """The verdict of these rewards; confidence is the sigmoid of their difference (Bradley-Terry).

    Raises:
        ModelError: a reward is not a number.
    """
    if not all(map(math.isfinite, rewards)):
        raise ModelError(f"the reward model gives {rewards} for {item.origin}: not numbers. Load it without 4 bit.")
    chosen, rejected = rewards.index(max(rewards)), rewards.index(min(rewards))
    margin = rewards[chosen] - rewards[rejected]
    is_tie = margin == 0 or margin < min_margin
    return Verdict(
        key=item.key, chosen=None if is_tie else chosen, rejected=None if is_tie else rejected, scores=tuple(rewards),
        confidence=1.0 if is_tie else 1 / (1 + math.exp(-margin)), method="reward_model", version=version, time=now(),
    )  # fmt: skip


def _check(options: RewardModelOptions) -> None:
    for name, value in (("batch_size", options.batch_size), ("max_length", options.max_length)):
        if value < 1:
            raise UsageError(f"--{name} {value}: must be above 0.")
    if not 0 <= options.min_margin < math.inf:
        raise UsageError(f"--min_margin {options.min_margin}: must be at least 0.")


def _score_all(
    items: Sequence[Candidates], scorer: RewardScorer, record: Record, options: RewardModelOptions, version: str
) -> list[str]:
    """Fill the record; returns what the chat template refused, where bad rows may be skipped."""
    from tqdm import tqdm

    refused: list[str] = []
    with tqdm(total=len(items), desc="scoring", unit=" sets", delay=1, leave=False) as bar:
        for chunk in _by_length(items, _BATCHES_AT_ONCE * options.batch_size):
            encoded = [(item, ids) for item in chunk if (ids := _encode(item, scorer, options.bad_rows, refused))]
            rewards = iter(scorer.score([ids for _, group in encoded for ids in group], options.batch_size))
            verdicts = [
                decide(item, [next(rewards) for _ in group], options.min_margin, version) for item, group in encoded
            ]
            if verdicts:
                record.add(*verdicts)
            bar.update(len(chunk))
    return refused


def _by_length(items: Sequence[Candidates], answers_at_once: int) -> Iterator[list[Candidates]]:
    """Chunks of items of similar length, the longest first: a device that is too small says so at once."""
    chunk: list[Candidates] = []
    answers = 0
    for item in sorted(items, key=_characters, reverse=True):
        chunk.append(item)
        answers += len(item.answers)
        if answers >= answers_at_once:
            yield chunk
            chunk, answers = [], 0
    if chunk:
        yield chunk


def _characters(item: Candidates) -> int:
    prompt = item.prompt if isinstance(item.prompt, str) else "".join(message["content"] for message in item.prompt)
    return len(prompt) + max(map(len, item.answers))


def _encode(item: Candidates, scorer: RewardScorer, bad_rows: str, refused: list[str]) -> list[list[int]]:
    """The ids of each answer with its prompt; none where the template refuses them."""
    try:
        return [scorer.encode(item.prompt, answer) for answer in item.answers]
    except UsageError as error:
        if bad_rows == "fail":
            raise DataError(f"{item.origin}: prompt: {error}. Repair it, or use --bad_rows skip.") from error
        refused.append(f"{item.origin}: prompt: {error}")
        return []
