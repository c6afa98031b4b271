"""What a bug report needs: versions, devices, processor."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import warnings
from pathlib import Path
from typing import Any

SAVED_WITH = ("torch", "transformers", "peft", "bitsandbytes")  # what the content of a checkpoint depends on
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "gradio", "wandb")


def cache_folder(named: str | Path | None = None) -> Path:
    """Where what can be computed again is kept: the named folder, that of QLORA_DPO_CACHE, or ~/.cache/qlora_dpo."""
    return Path(named or os.environ.get("QLORA_DPO_CACHE") or "~/.cache/qlora_dpo").expanduser()


def versions() -> dict[str, str]:
    """Versions of this tool and of what a checkpoint's content depends on."""
    from qlora_dpo import __version__

    return {"qlora_dpo": __version__} | {name: importlib.metadata.version(name) for name in SAVED_WITH}


def describe() -> dict[str, Any]:
    """Versions of Python, this tool and what it stands on; processor, memory and GPUs."""
    import torch

    from qlora_dpo import __version__

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "qlora_dpo": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
    }


def prepare_process() -> None:
    """Set up a command's process before torch is imported; never called on import.

    Idle OpenMP threads sleep instead of spinning (a busy neighbor otherwise slows a CPU run badly), and libraries
    keep to themselves what they say about each other.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    # bitsandbytes misses the optional package `kernels` on CPUs with AVX512-BF16; it is left out on purpose.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)


def print_description() -> None:
    """The `env` command."""
    print(json.dumps(describe(), indent=2))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
