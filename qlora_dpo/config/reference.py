"""The options of the reference store: where a run has it, and the commands that fill, check and move one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class StoreOptions:
    """Reference store: the reference's log-probs, computed once for all runs."""

    reference_store: str | None = None
    """SQLite file of them: what is there is read, what is missing is computed and added. none: in memory, for this run
    only. Default: a file for each reference, in ~/.cache/qlora_dpo/reference (QLORA_DPO_CACHE)."""
    reference_source: str | None = None
    """Take as the reference another model that --reference_store holds all the pairs of, such as one on a server: the
    name or the beginning of the fingerprint by which `reference info` lists it. Default: this run's own reference."""
    row_reference: Literal["verify", "ignore"] = "verify"
    """Log-probs that data rows bring along (reference_chosen_log_prob of OpenDPO): verify computes some here too and
    takes them as the reference if they agree within --max_drift, ignore computes the reference of these rows too."""
    max_drift: float | None = None
    """Mean difference per token, in nats, at which stored log-probs are refused when some are computed again here.
    Default: 0.0001 in float32, 0.05 in bfloat16 (or three times this model's own rounding), 0.5 for a
    --reference_source, 0.02 for those of data rows."""


@dataclass(frozen=True)
class FillOptions:
    """Fill: where the log-probs go, and which of them."""

    store: Path | None = None
    """SQLite file. Default: where `train` looks for this reference."""
    shard: str = "1/1"
    """2/3 computes the second third of the pairs: several processes fill one store, or machines one each."""
    max_tokens_per_microbatch: int | None = None
    """Tokens that go through the model at once. Default: what fits, found by measuring, on a GPU; 8192 on a CPU."""


@dataclass(frozen=True)
class ServedOptions:
    """Served model: under which name its log-probs are kept, and how far they are believed. Read with --endpoint."""

    served_as: str | None = None
    """Name in the store, by which `train --reference_source` takes them. Default: --endpoint_model@server."""
    verify: int = 32
    """Pairs that are also computed here, with --model_name_or_path as it would be trained, before any is kept. 0 for a
    machine that has only the tokenizer: then nothing is checked."""
    max_drift: float | None = None
    """Mean difference per token, in nats, between server and trainer above which nothing is kept. Default: rounding of
    bfloat16, 0.05, or three times the model's own rounding where that is more."""


@dataclass(frozen=True)
class RayOptions:
    """Ray: the workers of a cluster that compute in place of this machine."""

    engine: Literal["local", "ray"] = "local"
    """local: this process. ray: Ray Data hands out the pairs to workers, each with a model of its own, or asking the
    servers at --endpoint. Needs the package ray[data], here and on every node."""
    ray_address: str | None = None
    """Address of the cluster, such as 10.0.0.1:6379. Default: RAY_ADDRESS, or the cluster that runs on this machine;
    where there is none, one is started here for the command."""
    ray_workers: int | None = None
    """How many workers. Default: one for each GPU; without GPUs, and with --endpoint, one for each node."""


@dataclass(frozen=True)
class ScoreOptions:
    """Score: with which adapter, and where the scores go. What is not given of --beta and of the options of model and
    tokens is, where --adapter is a run, as in that run."""

    adapter: str
    """A run folder, a checkpoint in one, or a PEFT LoRA folder; none: the model itself, without an adapter."""
    output: Path
    """File to write: .jsonl, .jsonl.gz or .parquet. Its summary goes to *.summary.json beside it."""
    beta: float = 0.1
    """Scale of the rewards (arXiv 2305.18290)."""
    worst: int | None = None
    """Write only the N most suspicious rows, the worst first. Default: all rows, in their order."""
    per_token: bool = False
    """Add the tokens of both answers with the log-prob of each."""
    store: Path | None = None
    """SQLite file of the log-probs of both reference and policy. Default: for each the file in which `train` would look
    for it as a reference."""
    max_tokens_per_microbatch: int | None = None
    """Tokens that go through the model at once. Default: what fits, found by measuring, on a GPU; 8192 on a CPU."""


@dataclass(frozen=True)
class StoreInfoOptions:
    """Info: of which store."""

    store: Path
    """SQLite file."""


@dataclass(frozen=True)
class StoreVerifyOptions:
    """Verify: which store, and how much of it is computed again. Without a model and data only the file is checked."""

    store: Path
    """SQLite file."""
    verify: int = 32
    """Pairs of --dataset whose log-probs are computed again with --model_name_or_path."""
    max_drift: float | None = None
    """Mean difference per token, in nats, above which it is an error. Default: 0.0001 in float32, 0.05 in bfloat16 (or
    three times this model's own rounding)."""


@dataclass(frozen=True)
class StoreExportOptions:
    """Export: from where and to where."""

    store: Path
    """SQLite file."""
    output: Path
    """Parquet file to write: fingerprint, key, logps."""


@dataclass(frozen=True)
class StoreImportOptions:
    """Import: from where and to where."""

    file: Path
    """Parquet file that `reference export` wrote."""
    store: Path
    """SQLite file; it is made where there is none. Rows that it has already stay as they are."""
