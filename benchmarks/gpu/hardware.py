"""What the numbers were measured on, asked without importing torch, so that the process that waits stays small."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")


def hardware() -> dict[str, Any]:
    """GPUs with driver and memory in use, processor, and versions; None for what is not installed."""
    from qlora_dpo import __version__
    from qlora_dpo.environment import _processor

    return {
        "gpus": gpus("name,memory.total"),
        "driver": gpus("driver_version"),
        "gpu_memory_used_before": gpus("memory.used"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF"),
        "qlora_dpo": __version__,
        **{name: installed(name) for name in PACKAGES},
    }


def installed(package: str) -> str | None:
    """The version of a package, where it is there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpus(fields: str) -> list[str]:
    """What the driver says about each GPU; nothing where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]
