"""`data pair`: pairs of single answers that have a label (KTO) or a rating, and share a prompt.

The best answer to a prompt and the worst are a pair, then the second best and the second worst, while one is better
than the other; so each row is used once at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import orjson

from qlora_dpo.config.data import UnpairedOptions
from qlora_dpo.data.columns import without
from qlora_dpo.data.conversations import (
    Conversation,
    ConversationColumns,
    check_conversation_format,
    detect_conversation_format,
    parse_conversation,
)
from qlora_dpo.data.files.readers import Row, Rows, file_kind, settled_format
from qlora_dpo.data.files.sources import Source, open_source, with_config
from qlora_dpo.data.files.writers import WRITERS, is_flat, row_writer
from qlora_dpo.data.formats import all_columns, write_row
from qlora_dpo.data.messages import check_prompt
from qlora_dpo.data.pair_formats.layout import message_pair
from qlora_dpo.data.preferences import PreferencePair, RefusedRow, RowError
from qlora_dpo.data.progress import with_progress
from qlora_dpo.data.report import account_of, listed
from qlora_dpo.data.unclear import LABELS, RATINGS
from qlora_dpo.data.values import Values, kind
from qlora_dpo.errors import DataError, UsageError
from qlora_dpo.files.guard import check_output

_LABELS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True, slots=True)
class RatedAnswer:
    """A conversation whose last answer has a rating."""

    rating: float
    conversation: Conversation


@dataclass(slots=True)
class Unpaired:
    """Reads rated answers, and pairs them; always `rows == 2 * pairs + alone + len(refused)`."""

    source: Source
    dataset_format: str
    names: ConversationColumns
    rating_key: str | None
    rows: int = 0
    pairs: int = 0
    alone: int = 0
    """Rows without a partner: no answer to their prompt that is better or worse is left."""
    refused: list[RefusedRow] = field(default_factory=list)
    _answers: dict[bytes, list[RatedAnswer]] = field(default_factory=lambda: defaultdict(list))

    def read(self) -> None:
        """Read all rows, by prompt."""
        rows = self._with_format(self.source.rows(None))
        for row in with_progress(rows, "reading", None):
            self.rows += 1
            if isinstance(row, RefusedRow):
                self.refused.append(row)
                continue
            try:
                answer = self._parse(row)
            except RowError as error:
                self.refused.append(error.refused(row.origin))
                continue
            conversation = answer.conversation
            prompt = [conversation.messages[:-1], conversation.tools, conversation.chat_template_kwargs]
            self._answers[orjson.dumps(prompt, option=orjson.OPT_SORT_KEYS)].append(answer)

    def paired(self) -> Iterator[PreferencePair]:
        """The pairs, in the order in which their prompts were read."""
        for answers in self._answers.values():
            ranked = sorted(answers, key=lambda answer: -answer.rating)
            both = list(zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False))
            pairs = [_pair(better, worse) for better, worse in both if _differ(better, worse)]
            self.pairs += len(pairs)
            self.alone += len(answers) - 2 * len(pairs)
            yield from pairs

    def _with_format(self, rows: Rows) -> Rows:
        def detect(values: Values) -> str:
            if self.rating_key is None:
                self.rating_key = _rating_column(values)
            if self.dataset_format != "auto":
                return self.dataset_format
            return detect_conversation_format(self._without_rating(values), self.names)

        found, rows = settled_format(rows, detect)
        self.dataset_format = found or self.dataset_format
        return rows

    def _without_rating(self, values: Values) -> Values:
        return without(values, (str(self.rating_key), *LABELS))

    def _parse(self, row: Row) -> RatedAnswer:
        values = self._without_rating(row.values)
        conversation = parse_conversation(self.dataset_format, values, self.names, row.origin).conversation
        check_prompt("prompt", conversation.messages[:-1])
        return RatedAnswer(_rating(row.values, str(self.rating_key)), conversation)


def pair(options: UnpairedOptions) -> None:
    """Write the pairs of rated or labelled answers.

    Raises:
        DataError: when rows cannot be read and are not to be skipped, or there is no pair.
        StorageError: when something cannot be read or written.
        UsageError: when an option cannot work, or the rows have no rating.
    """
    if file_kind(options.output) is None or is_flat(options.output):
        nested = ", ".join(suffix for suffix in WRITERS if suffix != ".csv")
        raise UsageError(f"--output {options.output}: messages are written, so its name must end with one of {nested}.")
    check_output(options.output, inputs=[options.file])
    if options.dataset_format != "auto":
        check_conversation_format(options.dataset_format)
    source = open_source(
        with_config(options.file, options.dataset_config), split=options.split, revision=options.revision
    )
    names = ConversationColumns(options.messages_key, options.prompt_key, options.response_key)
    unpaired = Unpaired(source, options.dataset_format, names, options.rating_key)
    unpaired.read()
    if unpaired.refused and options.bad_rows == "fail":
        raise DataError(
            f"{len(unpaired.refused)} of {unpaired.rows} rows of {source.name} cannot be read:\n"
            f"{listed(unpaired.refused)}\nRepair them, or pair the others with --bad_rows skip."
        )
    with row_writer(options.output, all_columns("messages")) as add:
        for found in unpaired.paired():
            add(write_row("messages", found))
        if not unpaired.pairs:
            raise DataError(
                f"{source.name}: of {unpaired.rows} rows no two share a prompt and differ in {unpaired.rating_key}, so "
                "there is no pair. DPO needs a better and a worse answer to one prompt; nothing was written."
            )
    print("\n".join(_summary(unpaired, options)))


def _summary(unpaired: Unpaired, options: UnpairedOptions) -> list[str]:
    lines = [
        f"{unpaired.source.name}: {unpaired.pairs:,} pairs from {unpaired.rows:,} rows ({unpaired.dataset_format}, by "
        f"{unpaired.rating_key}) are in {options.output} (messages)"
    ]
    if unpaired.alone:
        lines.append(f"left out: {unpaired.alone:,} rows without a partner, a better or worse answer to their prompt")
    return [*lines, *account_of(unpaired.refused)]


def _differ(better: RatedAnswer, worse: RatedAnswer) -> bool:
    answers = (one.conversation.messages[-1] for one in (better, worse))
    return better.rating > worse.rating and next(answers) != next(answers)


def _pair(better: RatedAnswer, worse: RatedAnswer) -> PreferencePair:
    chosen, rejected = better.conversation, worse.conversation
    return message_pair(
        chosen.messages[:-1],
        chosen.messages[-1],
        rejected.messages[-1],
        category=chosen.category,
        origin=chosen.origin,
        tools=chosen.tools,
        chat_template_kwargs=chosen.chat_template_kwargs,
    )


def _rating_column(values: Mapping[str, object]) -> str:
    """The column of the label or the rating. Raises: UsageError where there is none."""
    found = next((column for column in (*LABELS, *RATINGS) if values.get(column) is not None), None)
    if found is None:
        raise UsageError(
            f"no column says how good an answer is: the columns are {', '.join(values) or 'none'}. Name it with "
            "--rating_key."
        )
    return found


def _rating(values: Values, column: str) -> float:
    value = values.get(column)
    if isinstance(value, str):  # CSV knows only text
        value = _LABELS.get(value.lower(), value)
    try:
        rating = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise RowError(column, f"must be a number, true or false (it is {kind(value)})") from None
    if rating != rating:
        raise RowError(column, "must be a number, true or false (it is nan)")
    return rating
