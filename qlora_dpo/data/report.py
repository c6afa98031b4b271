"""What became of every row of a data source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.data.tokenization import EQUAL_AFTER_TRUNCATION
from qlora_dpo.errors import DataError

_SHOWN_ROWS = 20


@dataclass(frozen=True, slots=True)
class DataReport:
    """The account of one loading; always `rows_read == pairs + len(refused)`."""

    source: str
    dataset_format: str
    rows_read: int
    pairs: int
    refused: tuple[RefusedRow, ...] = ()
    repaired: Mapping[str, int] = field(default_factory=dict)
    truncated_prompts: int = 0
    truncated_completions: int = 0
    dropped_equal_after_truncation: int = 0
    from_cache: bool = False
    refused_file: Path | None = None

    @property
    def refused_by_reason(self) -> Counter[str]:
        return Counter(row.kind for row in self.refused)

    @property
    def bad_rows(self) -> list[RefusedRow]:
        """The rows at fault themselves; a pair that only the length limits made equal is not."""
        return [row for row in self.refused if row.reason != EQUAL_AFTER_TRUNCATION]

    def check(self, bad_rows: str) -> None:
        """Refuse to go on without pairs, or with bad rows unless they are to be skipped.

        Raises:
            DataError: with the first bad rows and their number.
        """
        bad = self.bad_rows
        if bad and bad_rows == "fail":
            raise DataError(
                f"{len(bad)} of {self.rows_read} rows of {self.source} cannot be trained on:\n"
                f"{_listed(bad)}\n"
                f"Repair them, or train on the other {self.pairs} with --bad_rows skip. All are listed in "
                f"{self.refused_file}."
            )
        if not self.pairs:
            raise DataError(
                f"{self.source}: none of the {self.rows_read} rows is a {self.dataset_format} pair:\n"
                f"{_listed(list(self.refused))}\nCheck --dataset_format and the column names."
            )

    def summary(self) -> list[str]:
        """Return the account as lines to print."""
        cached = ", from the cache" if self.from_cache else ""
        origin = f"{self.rows_read:,} rows ({self.dataset_format}{cached})"
        lines = [f"{self.source}: {self.pairs:,} pairs from {origin}"]
        if self.refused:
            lines.append(f"refused: {len(self.refused):,} rows, listed in {self.refused_file}")
            lines += [f"  {count:,} x {kind}" for kind, count in self.refused_by_reason.most_common()]
        lines += [f"repaired: {count:,} x {kind}" for kind, count in self.repaired.items()]
        if self.truncated_prompts:
            lines.append(f"truncated: {self.truncated_prompts:,} prompts (the end was kept)")
        if self.truncated_completions:
            lines.append(f"truncated: {self.truncated_completions:,} answers (the start was kept, without end)")
        return lines


def _listed(rows: list[RefusedRow]) -> str:
    lines = [f"  {row}" for row in rows[:_SHOWN_ROWS]]
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"  ... and {len(rows) - _SHOWN_ROWS} more")
    return "\n".join(lines)
