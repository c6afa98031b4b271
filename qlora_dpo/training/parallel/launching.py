"""How a run gets its processes: what the launcher says about them, who of them speaks, and how they end together.

`accelerate launch`, torchrun, or srun with a few variables start one process per GPU and tell each its place: RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. accelerate's config files add what kind of run is meant.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from qlora_dpo.errors import Interrupted, ProcessLost, QloraDpoError, ResourceError, UsageError
from qlora_dpo.models.loading import choose_device
from qlora_dpo.training.parallel.ranks import ALONE, Ranks, is_lost, lost_processes, process_lost
from qlora_dpo.training.signals import Terminated

PATIENCE = timedelta(hours=3)  # of processes that wait for the first one to read the data or to write a checkpoint
COURTESY = 0.3  # seconds that the others leave to the first process, if it too has something to say
FAREWELL = 10.0  # seconds that the first process stays so that the others learn why it ends

_OWN_CHECKPOINTING = "layers are chosen by --activation_checkpointing"
# What a launcher's config can ask for and this loop does not do: variable, value, what to do instead.
_REFUSED = (
    ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed owns backward, clipping and checkpoints, which this loop does "
     "itself: use rlhf/accelerate/fsdp_qlora.yaml, which shards the base as ZeRO-3 does"),
    ("ACCELERATE_USE_MEGATRON_LM", "true", "there is no tensor or pipeline parallelism here: use DDP or FSDP"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "there is no tensor or context parallelism here: use DDP or FSDP"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", "float16 makes DPO's gradients overflow: leave it at `no`, --dtype decides"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", "leave it at `no`: --dtype decides"),
)  # fmt: skip
_REFUSED_WITH_FSDP = (
    ("FSDP_VERSION", "1", "set `fsdp_version: 2`"),
    ("FSDP_OFFLOAD_PARAMS", "true", "set `fsdp_offload_params: false` and use more GPUs"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "set `fsdp_cpu_ram_efficient_loading: false`: every process loads the "
     "base by itself"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", f"set `fsdp_activation_checkpointing: false`: {_OWN_CHECKPOINTING}"),
)  # fmt: skip


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in environment and int(environment.get("WORLD_SIZE", "1")) > 1


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """This process among those that the launcher started.

    Raises:
        UsageError: it asks for what this loop does not do.
    """
    is_sharded = _says(environment, "ACCELERATE_USE_FSDP", "true")
    for name, value, instead in (*_REFUSED, *(_REFUSED_WITH_FSDP if is_sharded else ())):
        if _says(environment, name, value):
            raise UsageError(f"the launcher's config says {name}={value}, but {instead}.")
    if not is_launched(environment):
        if is_sharded:
            raise UsageError(
                "the launcher's config asks for FSDP, but there is one process: nothing can be sharded. Start more "
                "(`accelerate launch --num_processes 2`), or leave the config out."
            )
        return ALONE
    return Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]), is_sharded)


def device_of(ranks: Ranks, use_cpu: bool, environment: Mapping[str, str] = os.environ) -> torch.device:
    """This process's device: its own GPU, or the CPU.

    Raises:
        ResourceError: there are more processes than GPUs.
    """
    if ranks.count == 1:
        return choose_device(use_cpu)
    if choose_device(use_cpu or _says(environment, "ACCELERATE_USE_CPU", "true")).type == "cpu":
        return torch.device("cpu")
    gpus, number = torch.cuda.device_count(), int(environment.get("LOCAL_RANK", "0"))
    if gpus > 1 and number >= gpus:
        raise ResourceError(
            f"process {ranks.rank} is number {number} on its machine, which has {gpus} GPUs. Start one process per GPU."
        )
    device = torch.device("cuda", min(number, gpus - 1))  # a scheduler may show each process its own GPU only
    torch.cuda.set_device(device)
    return device


@contextmanager
def joined(use_cpu: bool) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes of this run until the block ends, and this one's device.

    The first process speaks. Where one fails, it says why, and all end with its exit code.

    Raises:
        UsageError, ResourceError: this cannot be run as it was launched.
        SystemExit: another process has failed and said why.
    """
    ranks = ranks_of(os.environ)
    device = device_of(ranks, use_cpu)
    if ranks.count == 1:
        yield ranks, device
        return
    with lost_processes():
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        with _speaking(ranks.is_main):
            yield ranks, device
            ranks.wait()
    except BaseException as error:
        code = _leave(ranks, store, error)
        if code is not None:
            raise SystemExit(code) from None
        if is_lost(error) and not isinstance(error, ProcessLost):  # within the model
            raise process_lost(error) from error
        raise
    dist.destroy_process_group()


@contextmanager
def _speaking(is_main: bool) -> Iterator[None]:
    """Within this block only the first process is heard."""
    with ExitStack() as stack:
        if not is_main:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield


def _leave(ranks: Ranks, store: Any, error: BaseException) -> int | None:
    """Let the others go; returns None for the process that is to say why, for others the exit code to follow."""
    is_first, code = ranks.rank <= 1, _exit_code(error)
    if not ranks.is_main:
        time.sleep(COURTESY)
    with suppress(RuntimeError):  # the store ends with the first process, and then the second one speaks
        is_first = store.add("ended", 1) == 1
        if is_first:
            store.set("exit_code", str(code))
        elif store.check(["exit_code"]):
            code = int(store.get("exit_code"))
        store.add("gone", 1)
    if is_first and not ranks.is_main and not is_lost(error):
        print(f"in process {ranks.rank} of {ranks.count}:", file=sys.stderr)
    # Its connections closed, the others notice at once. NCCL may wait there for what never comes: not for long.
    closing = Thread(target=_close, daemon=True)
    closing.start()
    closing.join(1.0)
    if ranks.is_main:
        deadline = time.monotonic() + FAREWELL
        with suppress(RuntimeError):
            while store.add("gone", 0) < ranks.count and time.monotonic() < deadline:
                time.sleep(0.05)
    return None if is_first else code


def _close() -> None:
    with suppress(RuntimeError, ValueError, AssertionError):
        dist.destroy_process_group()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, QloraDpoError):
        return error.exit_code
    if is_lost(error):
        return ProcessLost.exit_code
    if isinstance(error, Terminated):
        return Interrupted.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _says(environment: Mapping[str, str], name: str, value: str) -> bool:
    return environment.get(name, "").lower() == value
