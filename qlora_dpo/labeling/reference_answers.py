"""Belle's recipe: the reference answer to a question is chosen, the model's own answer rejected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_dpo.config.labeling import EndpointOptions, LocalModelOptions, ReferenceLabelOptions, SamplingOptions
from qlora_dpo.errors import DataError
from qlora_dpo.labeling.generate import answer
from qlora_dpo.labeling.prompts import PromptRow, load_prompts
from qlora_dpo.labeling.records import Candidates, Verdict, finish, now, open_record, pending

NO_REFERENCE = "without a reference answer"
SAME = "where the model gave the reference answer"
EMPTY = "where the model gave an empty answer"


def label_by_reference(
    options: ReferenceLabelOptions, sampling: SamplingOptions, local: LocalModelOptions, server: EndpointOptions
) -> None:
    """The `label reference` command: questions with reference answers become pairs.

    Raises:
        DataError: no question has a reference answer; others as `generate`.
    """
    questions = load_prompts(
        options.questions,
        sampling.bad_rows,
        prompt_key=options.question_key,
        reference_answer_key=options.reference_answer_key,
        category_key=options.category_key,
    )
    record = open_record(options.output, "reference", options.questions)
    answerable = [row for row in questions if row.reference_answer is not None]
    left_out = Counter({NO_REFERENCE: len(questions) - len(answerable)})
    print(f"{options.questions}: {len(answerable):,} of {len(questions):,} rows have a reference answer.")
    if not answerable:
        raise DataError(
            f"{options.questions}: no row has a reference answer in the column {options.reference_answer_key!r}; name "
            "another with --reference_answer_key."
        )
    answers_file = answers_path(options.output)
    answers = answer(options.questions, answerable, answers_file, 1, options.model, sampling, local, server)
    candidates = _candidates(answerable, answers, left_out)
    version = next((_model_of(row) for row in answers.values()), "")
    record.add(
        *(
            Verdict(
                key=item.key, chosen=0, rejected=1, scores=(), confidence=1.0, method="reference", version=version,
                time=now(),
            )
            for item in pending(candidates, record.verdicts(), version=version)
        )
    )  # fmt: skip
    for reason, count in left_out.items():
        print(f"left out: {count:,} rows {reason}")
    print(finish(options.output, candidates, record.verdicts()))


def answers_path(output: Path) -> Path:
    """pairs.jsonl is made of the answers in pairs.answers.jsonl."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.answers.jsonl")


def _candidates(
    questions: Sequence[PromptRow], answers: dict[int, dict[str, Any]], left_out: Counter[str]
) -> list[Candidates]:
    """The reference answer and the own answer to each question."""
    candidates: list[Candidates] = []
    for question in questions:
        row = answers.get(question.number)
        if row is None:  # refused, and reported
            continue
        reference, own = question.reference_answer or "", row["answers"][0]
        if own.strip() and own.strip() != reference.strip():
            candidates.append(
                Candidates(question.prompt, (reference, own), question.category, reference, question.origin)
            )
        else:
            left_out[SAME if own.strip() else EMPTY] += 1
    return candidates


def _model_of(row: dict[str, Any]) -> str:
    """What wrote an answer."""
    return " ".join(str(row["generation"][name]) for name in ("model", "adapter") if row["generation"][name])
