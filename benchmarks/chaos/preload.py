"""What every run imports; the server that the runs are forked from imports it once."""

from __future__ import annotations

import importlib

for name in (
    "benchmarks.preload",
    "jsonargparse",
    "omegaconf",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "datasets",
    "pyarrow.parquet",
    "transformers.trainer",
    "qlora_dpo.cli",
    "qlora_dpo.training.train",
):
    importlib.import_module(name)
