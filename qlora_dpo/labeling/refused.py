"""What is said about rows that a labeller cannot use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.data.report import listed
from qlora_dpo.errors import DataError


def report_refused(source: str, refused: Sequence[RefusedRow], usable: int, bad_rows: Literal["fail", "skip"]) -> None:
    """Say which rows are left out; a row that prefers neither answer always may be.

    Raises:
        DataError: they may not be, or no other is left.
    """
    if not refused:
        return
    total = len(refused) + usable
    bad = [row for row in refused if not row.left_out]
    if not usable or (bad and bad_rows == "fail"):
        advice = f"\nRepair them, or go on with the other {usable} by --bad_rows skip." if usable else ""
        bad = bad or list(refused)
        raise DataError(f"{len(bad)} of {total} rows of {source} cannot be used:\n{listed(bad)}{advice}")
    print(f"{source}: {len(refused):,} of {total:,} rows are left out:\n{listed(refused)}")
    for kind, count in Counter(row.kind for row in refused).most_common():
        print(f"  {count:,} x {kind}")
