"""Every measurement in a process of its own, with a peak of its own.

The processes are forked from a server that has imported the libraries and done nothing else, which saves ten seconds
each. The caller imports no torch, and its own peak is not inherited: `VmHWM` counts from the fork, where `ru_maxrss`
would start at the parent's peak.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def run(function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
    """Call a module's function in a new process; hands back what it returns or raises.

    Raises:
        BrokenProcessPool: the process was killed, most likely for want of memory.
    """
    start_server()
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(_prepared, partial(function, *args, **kwargs)).result()


def peak_gib() -> float:
    """The largest resident size of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None, "this system does not tell a process's peak (VmHWM)"
    return int(found[1]) / 2**20


def start_server(preload: Sequence[str] = ("benchmarks.preload",)) -> None:
    """Start the server where it does not run yet, with these modules; it finds this repository by PYTHONPATH."""
    from qlora_dpo.environment import prepare_process

    prepare_process()  # OMP_WAIT_POLICY is inherited
    os.environ["TQDM_DISABLE"] = "1"
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        get_context("forkserver").set_forkserver_preload(list(preload))
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _prepared(call: Callable[[], Result]) -> Result:
    from qlora_dpo.environment import prepare_process

    prepare_process()
    return call()
