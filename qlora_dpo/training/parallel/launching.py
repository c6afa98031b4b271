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
MESSAGE = timedelta(minutes=10)  # of GPUs that wait for each other within a pass: one of them is gone
COURTESY = 0.3  # seconds that the others leave to the first process, if it too has something to say
FAREWELL = 10.0  # seconds that the first process stays so that the others learn why it ends

_OWN_CHECKPOINTING = "layers are chosen by --activation_checkpointing"
# What a launcher's config can ask for and this loop does not do: variable, value, what to do instead.
_REFUSED = (
    ("ACCELERATE_USE_MEGATRON_LM", "true", "there is no tensor or pipeline parallelism here: use DDP or FSDP"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "there is no tensor or context parallelism here: use DDP or FSDP"),
    ("ACCELERATE_DYNAMO_BACKEND", "inductor", "nothing is compiled here: leave `dynamo_backend` out"),
    ("ACCELERATE_MIXED_PRECISION", "fp16", "float16 makes DPO's gradients overflow: leave it at `no`, --dtype decides"),
    ("ACCELERATE_MIXED_PRECISION", "fp8", "leave it at `no`: --dtype decides"),
)  # fmt: skip
_REFUSED_WITH_FSDP = (
    ("FSDP_VERSION", "1", "set `fsdp_version: 2`"),
    ("FSDP_RESHARD_AFTER_FORWARD", "false", "set `fsdp_reshard_after_forward: true`"),
    ("FSDP_OFFLOAD_PARAMS", "true", "set `fsdp_offload_params: false` and use more GPUs"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "set `fsdp_cpu_ram_efficient_loading: false`: every process loads the "
     "base by itself"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", f"set `fsdp_activation_checkpointing: false`: {_OWN_CHECKPOINTING}"),
)  # fmt: skip
# Of DeepSpeed only ZeRO-3's partitioning of the base is used: variable, what it may be, what to do instead.
_ALLOWED_WITH_DEEPSPEED = (
    ("ACCELERATE_DEEPSPEED_CONFIG_FILE", ("none",), "its engine, which such a file configures, is not used: use "
     "rlhf/accelerate/deepspeed_zero3.yaml as it is"),
    ("ACCELERATE_DEEPSPEED_ZERO_STAGE", ("3",), "an adapter has hardly any optimizer state to divide: use "
     "rlhf/accelerate/ddp.yaml, or set `zero_stage: 3`"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("none",), "set `offload_param_device: none` and use more GPUs"),
    ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("none",), "set `offload_optimizer_device: none`: --optim "
     "paged_adamw_8bit moves its state to CPU memory where it must"),
    ("ACCELERATE_DEEPSPEED_ZERO3_INIT", ("false",), "set `zero3_init_flag: false`: every process loads the base by "
     "itself"),
    ("ACCELERATE_GRADIENT_CLIPPING", ("none",), "leave `gradient_clipping` out: --max_grad_norm decides"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("none", "1"), "leave `gradient_accumulation_steps` out: the option of "
     "that name decides"),
)  # fmt: skip


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in environment and int(environment.get("WORLD_SIZE", "1")) > 1


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """This process among those that the launcher started.

    Raises:
        UsageError: it asks for what this loop does not do.
    """
    is_fsdp = _says(environment, "ACCELERATE_USE_FSDP", "true")
    is_zero3 = _says(environment, "ACCELERATE_USE_DEEPSPEED", "true")
    refused = [row for row in (*_REFUSED, *(_REFUSED_WITH_FSDP if is_fsdp else ())) if _says(environment, *row[:2])]
    refused += _refused_of_deepspeed(environment) if is_zero3 else []
    for name, value, instead in refused:
        raise UsageError(f"the launcher's config says {name}={value}, but {instead}.")
    if not is_launched(environment):
        if is_fsdp or is_zero3:
            raise UsageError(
                f"the launcher's config asks for {'DeepSpeed' if is_zero3 else 'FSDP'}, but there is one process: "
                "nothing can be sharded. Start more (`accelerate launch --num_processes 2`), or leave the config out."
            )
        return ALONE
    return Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]), is_fsdp or is_zero3, is_zero3)


def _refused_of_deepspeed(environment: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What a config of DeepSpeed says that is not done here."""
    said = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"} | dict(environment)  # accelerate's own default
    rows = ((name, said.get(name, allowed[0]).lower(), allowed, instead)
            for name, allowed, instead in _ALLOWED_WITH_DEEPSPEED)  # fmt: skip
    return [(name, value, instead) for name, value, allowed, instead in rows if value not in allowed]


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
    try:
        ranks = ranks_of(os.environ)
    except UsageError as error:
        if os.environ.get("RANK", "0") != "0":  # all read the same, and the first one says it
            raise SystemExit(error.exit_code) from None
        raise
    device = device_of(ranks, use_cpu)
    if ranks.count == 1:
        yield ranks, device
        return
    with lost_processes():
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    store: Any = dist.distributed_c10d._get_default_store()
    try:
        with _speaking(ranks.is_main):
            ranks.refuse_differences((device.type, torch.__version__), "a kind of device or a version of torch")
            if device.type == "cuda":
                world: Any = dist.group.WORLD
                world._get_backend(device)._set_default_timeout(MESSAGE)
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
