"""The measuring process: runs jobs one after the other and writes their rows as they come.

python -m benchmarks.gpu.child JOBS.json ROWS.jsonl
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu.rows import NEEDS_CUDA, Row, RowFile


def main(arguments: list[str]) -> None:
    """Run every job of the file; a job that fails says so in its rows, and the next one follows."""
    from qlora_dpo.environment import prepare_process

    prepare_process()
    jobs, rows = json.loads(Path(arguments[0]).read_text(encoding="utf-8")), RowFile(Path(arguments[1]))
    for job in jobs:
        run_job(job, rows)


def run_job(job: dict[str, Any], rows: RowFile) -> None:
    """Call the job's function, which yields rows; what it raises becomes a note on each row that it still owed."""
    import torch

    owed = {(table, name) for table, name in job["rows"]}
    try:
        if job["needs_cuda"] and not torch.cuda.is_available():
            reason = NEEDS_CUDA
        else:
            module, _, function = job["call"].partition(":")
            for row in getattr(importlib.import_module(module), function)(**job["arguments"]):
                rows.add(row)
                owed.discard((row.table, row.name))
            reason = "gave no row"
    except Exception as error:  # a benchmark that fails is a result, and others wait
        traceback.print_exc()
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    for table, name in sorted(owed):
        rows.add(Row(table, name, note=reason))
    release()


def release() -> None:
    """Give memory back that nothing holds any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> float:
    """Wait for the GPU where there is one; returns the time."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main(sys.argv[1:])
