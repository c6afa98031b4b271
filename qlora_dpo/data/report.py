"""What became of every row of a data source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_dpo.data.completions import OPEN_THOUGHT
from qlora_dpo.data.conversation_tokens import NOTHING_WITHIN_MAX_LENGTH
from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.data.tokenization import EQUAL_AFTER_TRUNCATION
from qlora_dpo.errors import DataError

_SHOWN_ROWS = 20
_MANY = 0.01  # share of the rows


@dataclass(frozen=True, slots=True)
class DataReport:
    """The account of one loading; always `rows_read + further_pairs == pairs + len(refused)`: each row is a pair or is
    refused, and of a row with further pairs so is each of these. SFT data has conversations for pairs."""

    source: str
    dataset_format: str
    rows_read: int
    pairs: int
    refused: tuple[RefusedRow, ...] = ()
    repaired: Mapping[str, int] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_completions: int = 0
    dropped_equal_after_truncation: int = 0
    truncated_conversations: int = 0
    context_turns: int = 0
    reference_logps: int = 0
    dropped_reference_logps: int = 0
    from_cache: bool = False
    refused_file: Path | None = None
    unread_columns: tuple[str, ...] = ()
    """Columns that the rows have and nobody reads."""
    unit: str = "pairs"
    further_pairs: int = 0
    """Pairs that rows held besides their first."""

    @property
    def refused_by_reason(self) -> Counter[str]:
        return Counter(row.kind for row in self.refused)

    @property
    def bad_rows(self) -> list[RefusedRow]:
        """The rows at fault themselves; a tie is not, nor one that only the length limits leave nothing of."""
        of_limits = (EQUAL_AFTER_TRUNCATION, NOTHING_WITHIN_MAX_LENGTH)
        return [row for row in self.refused if not row.left_out and not row.reason.startswith(of_limits)]

    def check(self, bad_rows: str) -> None:
        """Refuse to go on without pairs, or with bad rows unless they are to be skipped.

        Answers that would end inside a thought are never skipped where they are many: it is the template that does not
        fit to them.

        Raises:
            DataError: with the first bad rows and their number.
        """
        bad = self.bad_rows
        thoughts = [row for row in bad if row.reason.startswith(OPEN_THOUGHT)]
        if thoughts and len(thoughts) >= _MANY * self.rows_read:
            raise DataError(
                f"{len(thoughts)} of {self.rows_read} rows of {self.source} have an answer that would end inside the "
                "thought that the generation prompt of the chat template opens, so the model would learn not to close "
                f"it:\n{listed(thoughts, 3)}\nLet the template open no thought (--chat_template_kwargs "
                "'{\"enable_thinking\": false}' where it can, or another --prompt_template), or give every answer its "
                "thought (<think>...</think> in front of it)."
            )
        if bad and bad_rows == "fail":
            raise DataError(
                f"{len(bad)} of {self.rows_read} rows of {self.source} cannot be trained on:\n"
                f"{listed(bad)}\n"
                f"Repair them, or train on the other {self.pairs} with --bad_rows skip."
                + (f" All are listed in {self.refused_file}." if self.refused_file else "")
            )
        if not self.pairs:
            raise DataError(
                f"{self.source}: none of the {self.rows_read} rows is a {self.dataset_format} "
                f"{self.unit.removesuffix('s')}:\n"
                f"{listed(self.refused)}\n{self._advice()}"
            )

    def _advice(self) -> str:
        if any(row.reason == "missing" for row in self.refused):
            return "Check --dataset_format and the column names."
        return "Repair them, or name other data."

    def summary(self) -> list[str]:
        """Return the account as lines to print."""
        cached = ", from the cache" if self.from_cache else ""
        origin = f"{self.rows_read:,} rows ({self.dataset_format}{cached})"
        lines = [f"{self.source}: {self.pairs:,} {self.unit} from {origin}"]
        if self.further_pairs:
            lines.append(f"ranked: {self.further_pairs:,} more pairs than rows, of rows with more than two answers")
        lines += account_of(self.refused, self.refused_file)
        lines += [f"repaired: {count:,} x {kind}" for kind, count in self.repaired.items()]
        lines += not_read(self.unread_columns)
        if self.truncated_prompts:
            lines.append(f"truncated: {self.truncated_prompts:,} prompts (the end was kept)")
        if self.truncated_completions:
            lines.append(f"truncated: {self.truncated_completions:,} answers (the start was kept, without end)")
        if self.dropped_reference_logps:
            lines.append(
                f"reference log-probs: {self.dropped_reference_logps:,} pairs lose those of their rows, which are of "
                "the text before it was truncated"
            )
        if self.truncated_conversations:
            lines.append(f"truncated: {self.truncated_conversations:,} conversations (the start was kept)")
        if self.context_turns:
            lines.append(
                f"context only: {self.context_turns:,} answers before the last one, which the chat template writes "
                "otherwise once messages follow them"
            )
        return lines


def account_of(refused: Sequence[RefusedRow], listed_in: Path | None = None) -> list[str]:
    """How many rows were refused and how many left out, each with the reasons, as lines to print."""
    lines = []
    for name, rows in (
        ("refused", [row for row in refused if not row.left_out]),
        ("left out", [row for row in refused if row.left_out]),
    ):
        if rows:
            lines.append(f"{name}: {len(rows):,} rows" + (f", listed in {listed_in}" if listed_in else ""))
            kinds = Counter(row.kind for row in rows)
            lines += [f"  {count:,} x {kind}" for kind, count in kinds.most_common()]
    return lines


def not_read(columns: Sequence[str]) -> list[str]:
    """The columns that nobody reads, as the one line that every summary has of them."""
    return [f"not read: {', '.join(columns)}"] * bool(columns)


def listed(rows: Sequence[RefusedRow], shown: int = _SHOWN_ROWS) -> str:
    """The first rows, a line each, and how many more there are."""
    lines = [f"  {row}" for row in rows[:shown]]
    if len(rows) > shown:
        lines.append(f"  ... and {len(rows) - shown} more")
    return "\n".join(lines)
