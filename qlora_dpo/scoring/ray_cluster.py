"""A Ray cluster: connected to or started, divided among workers, and kept from talking."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil

from qlora_dpo.config.reference import RayOptions
from qlora_dpo.environment import prepare_process
from qlora_dpo.errors import QloraDpoError, ResourceError, UsageError

Found = TypeVar("Found")


@dataclass(frozen=True)
class Workers:
    """How many workers a cluster gets, and what each of them holds."""

    count: int
    cpus: int
    gpus: int

    @classmethod
    def of(cls, nodes: Sequence[dict[str, Any]], asked: int | None, *, use_gpu: bool, has_model: bool) -> Workers:
        """One for each GPU; where none is used, one for each node, which takes all its CPUs if it has a model.

        Args:
            nodes: as `ray.nodes()` describes them.
            asked: --ray_workers, which share the CPUs evenly.
        """
        resources = [node["Resources"] for node in nodes if node["Alive"]]
        gpus = sum(int(found.get("GPU", 0)) for found in resources) if use_gpu else 0
        if gpus:
            return cls(asked or gpus, 1, 1)
        cpus = [int(found["CPU"]) for found in resources if found.get("CPU", 0) >= 1]
        count = asked or len(cpus) or 1
        most = max(cpus, default=1) if has_model else 1
        fitting = (share for share in range(most, 1, -1) if sum(own // share for own in cpus) >= count)
        return cls(count, next(fitting, 1), 0)

    def __str__(self) -> str:
        device = "1 GPU" if self.gpus else f"{self.cpus} CPU{'' if self.cpus == 1 else 's'}"
        return f"{self.count} worker{'' if self.count == 1 else 's'} with {device}{'' if self.count == 1 else ' each'}"


@contextmanager
def ray_workers(options: RayOptions, *, use_gpu: bool, has_model: bool = True) -> Iterator[Workers]:
    """Connected to a cluster, or to one that is started on this machine until the block ends.

    Raises:
        UsageError: Ray is not installed.
        ResourceError: there is no cluster at that address, or it cannot be used from here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray warns of it otherwise
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # of what this process logs on stderr
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UsageError(
            "--engine ray needs the package ray, which is not installed: pip install 'ray[data]'."
        ) from error
    is_connected = ray.is_initialized()  # by the program that calls this function
    if not is_connected:
        _connect(options.ray_address)
    try:
        _silence()
        nodes = ray.nodes()
        workers = Workers.of(nodes, options.ray_workers, use_gpu=use_gpu, has_model=has_model)
        alive = sum(node["Alive"] for node in nodes)
        print(f"Ray: {workers} on {alive} node{'' if alive == 1 else 's'}", file=sys.stderr)
        yield workers
    except (ray.exceptions.RayError, ray.data.exceptions.ExecutionTimeoutError) as error:
        raise ResourceError(
            f"the Ray cluster gave up: {_last_line(error)} What came back is in the store, and the same command goes "
            "on. Every node needs this package in the driver's version; a worker that is killed again and again lacks "
            "memory. Ray's own logs are in /tmp/ray/session_latest/logs of each node."
        ) from error
    finally:
        if not is_connected:
            ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    named = address or os.environ.get("RAY_ADDRESS")
    try:
        if named and ":" in named:  # Ray itself would try for minutes
            socket.create_connection(named.rsplit(":", 1), timeout=10).close()  # type: ignore[arg-type]
        with _own_sigterm(), _no_stderr():
            ray.init(named, include_dashboard=False, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ResourceError(
            f"the Ray cluster at {named or 'this machine'} cannot be used: {_last_line(error)} Check --ray_address (or "
            "RAY_ADDRESS), that Ray and Python have the same versions there, and that its token is here if it has one."
        ) from error
    if any("gcs_server" in child.name() for child in psutil.Process().children(recursive=True)):
        print("No Ray cluster runs here: one was started on this machine, for this command.", file=sys.stderr)


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Within this block SIGTERM may get another handler; Ray gives it one that ends the process with exit code 15."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Within this block what is written to stderr is lost, also by other languages and by processes that are started:
    Ray announces the log level of its C++ part there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _silence() -> None:
    """Leave what Ray Data says to its log file."""
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":
            handler.setLevel(logging.CRITICAL + 1)


def on_a_worker(workers: Workers, find: Callable[[], Found]) -> Found:
    """The result of `find` on a node that can have a worker.

    Raises:
        QloraDpoError: what it raises there.
    """
    import ray

    task: Any = ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(_found)
    found: Found | QloraDpoError = ray.get(task.remote(find))
    if isinstance(found, QloraDpoError):
        raise found
    return found


def _found(find: Callable[[], Found]) -> Found | QloraDpoError:
    prepare_process()
    try:
        return find()
    except QloraDpoError as error:
        return type(error)(f"on the node {node_name()}: {error}")


def node_name() -> str:
    """What a person calls this machine."""
    import ray

    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[-1].strip().rstrip('.')}."
