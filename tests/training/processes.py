"""Runs of `train` in several real processes on the CPU, joined over gloo as a launcher would."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forks import FORKS
from safetensors.torch import load_file
from torch import Tensor

from qlora_dpo.training.records.tracking import read_metrics

PATIENCE = 60.0


@dataclass
class Started:
    """The processes of a run, and the folder of what each says."""

    processes: list[Any]
    folder: Path

    def wait(self) -> list[int]:
        """The exit codes, once all have ended; None stands for one that never does."""
        deadline = time.monotonic() + PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def said(self, rank: int | None = None) -> str:
        """What one process has written on stderr, or all have."""
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join((self.folder / f"stderr-{each}").read_text() for each in ranks)

    def wait_for(self, words: str, rank: int = 0) -> None:
        """Return when a process has said this."""
        deadline = time.monotonic() + PATIENCE
        while words not in self.said(rank):
            assert time.monotonic() < deadline and self.processes[rank].is_alive(), self.said()
            time.sleep(0.02)


def start(
    count: int, arguments: Sequence[str | Path], folder: Path, sabotage: Callable[[int], None] | None = None,
    **environment: str,
) -> Started:  # fmt: skip
    """Start `train` in `count` processes; `sabotage` is called in each with its rank before it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = dict(os.environ) | environment
    if count > 1:
        variables |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(count):
        own = variables | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
        (folder / f"stderr-{rank}").write_text("")
        process: Any = FORKS.Process(target=_run, args=(list(map(str, arguments)), folder, rank, own, sabotage))
        process.start()
        processes.append(process)
    return Started(processes, folder)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _run(
    arguments: list[str], folder: Path, rank: int, environment: dict[str, str], sabotage: Callable[[int], None] | None
) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(100 + rank)  # processes of a launcher differ in that too
    file = os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if sabotage is not None:
        sabotage(rank)
    from qlora_dpo.cli import main

    sys.exit(main(["train", *arguments]))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def adapter(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter_model.safetensors")


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
