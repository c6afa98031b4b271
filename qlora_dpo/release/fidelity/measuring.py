"""How much of a trained adapter a merged folder keeps, measured on what is on the disk."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from qlora_dpo.errors import ModelError
from qlora_dpo.release.fidelity.distributions import Compared
from qlora_dpo.release.fidelity.yardstick import Yardstick, free_memory

LEAST_MARGIN_KEPT = 0.95
MOST_KL, CLOSE_KL = 0.20, 0.05  # of what training changed: refused above the first, not worth a word below the second
ROOM = 1.25  # times its weights is what a model takes with its activations

Memory = dict[Any, int | str]
"""How much accelerate may use, by device: `{"cpu": "4GB"}`."""


@dataclass(frozen=True)
class Fidelity:
    """What a merged model keeps of the trained adapter; None is what could not be measured."""

    kl_mean: float | None = None
    """KL(trained || merged) per token over the whole vocabulary, in nats."""
    kl_p99: float | None = None
    kl_of_scale: float | None = None
    """kl_mean divided by KL(trained || reference): 0 is the trained adapter, 1 as far from it as the base is."""
    top1_agreement: float | None = None
    """Share of tokens where both find the same one likeliest."""
    mean_logp_difference: float | None = None
    """Of the given tokens, |merged - trained|."""
    max_logp_difference: float | None = None
    margin: float | None = None
    """Mean implicit margin of the pairs, against the reference that the trained one's is against."""
    margin_retained: float | None = None
    """margin divided by the trained adapter's."""
    reward_accuracy: float | None = None
    problems: list[str] = field(default_factory=list)
    """Why it is refused."""
    warnings: list[str] = field(default_factory=list)

    @property
    def is_refused(self) -> bool:
        """Whether it may only leave with --force."""
        return bool(self.problems)


def measure(yardstick: Yardstick, folder: Path, device: torch.device, memory: Memory | None = None) -> Fidelity:
    """Load the model folder as plain transformers does and hold it against the trained adapter.

    It runs on `device` where it fits there, else on the CPU; what exceeds the memory stays on the disk. `memory` sets
    how much of each accelerate may use.

    Raises:
        ModelError: transformers cannot load it, or it has another vocabulary.
        ResourceError: the device ran out of memory.
    """
    with loaded(folder, device, memory) as model:
        compared = yardstick.recorded.compare(model)
        dtype = str(model.dtype).removeprefix("torch.")
        del model
    free_memory()
    if compared.not_numbers:
        return Fidelity(problems=[_not_numbers(folder, compared, dtype)])
    return _judged(yardstick, compared)


@contextmanager
def loaded(folder: Path, device: torch.device, memory: Memory | None = None) -> Iterator[Any]:
    """The model of a folder by plain transformers, in the type in which it is stored.

    Raises:
        ModelError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    place: dict[str, Any] = {"device_map": "auto", "max_memory": memory} if memory else _place(folder, device)
    with tempfile.TemporaryDirectory(prefix=".offload-", dir=folder.parent) as offload:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, local_files_only=True, offload_folder=offload, **place
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ModelError(f"the merged folder {folder} cannot be loaded by transformers: {reason}") from error
        yield model.eval()
        del model


def _place(folder: Path, device: torch.device) -> dict[str, Any]:
    """Where a model goes: the first of device, CPU, and all of these with the disk that has room for it."""
    needed = ROOM * sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0]:
        return {"device_map": {"": device}}
    if needed < psutil.virtual_memory().available:
        return {"device_map": {"": torch.device("cpu")}}
    return {"device_map": "auto"}


def _judged(yardstick: Yardstick, compared: Compared) -> Fidelity:
    differences = np.abs(compared.logps - yardstick.recorded.logps)
    kl = compared.kl_mean
    of_scale = kl / yardstick.scale if yardstick.tells_kl else None
    margins = yardstick.margins_of(compared.logps)
    margin = float(margins.mean()) if yardstick.pairs else None
    kept = float(margins.mean() / yardstick.margins.mean()) if yardstick.tells_margin else None
    problems, warnings = _verdict(kl, of_scale, kept)
    return Fidelity(
        kl_mean=_finite(kl),
        kl_p99=_finite(compared.kl_p99),
        kl_of_scale=_finite(of_scale),
        top1_agreement=float((compared.tops == yardstick.recorded.tops).mean()),
        mean_logp_difference=_finite(float(differences.mean())),
        max_logp_difference=_finite(float(differences.max())),
        margin=_finite(margin),
        margin_retained=_finite(kept),
        reward_accuracy=float((margins > 0).mean()) if yardstick.pairs else None,
        problems=problems,
        warnings=warnings,
    )


def _finite(number: float | None) -> float | None:
    """None for what JSON cannot write."""
    return number if number is not None and math.isfinite(number) else None


def _verdict(kl: float, of_scale: float | None, kept: float | None) -> tuple[list[str], list[str]]:
    """What stands against a merge, and what to look at."""
    problems, warnings = [], []
    if not math.isfinite(kl):
        problems.append("its KL is infinite: it excludes tokens that the trained adapter writes")
    elif of_scale is not None and of_scale > CLOSE_KL:
        found = f"its KL from the trained adapter is {_percent(of_scale)} of what training changed"
        if of_scale > MOST_KL:
            problems.append(f"{found} (the limit is {_percent(MOST_KL)})")
        else:
            warnings.append(f"{found}: read some of its answers")
    if kept is not None and kept < LEAST_MARGIN_KEPT:
        least = _percent(LEAST_MARGIN_KEPT)
        problems.append(f"it keeps {_percent(kept)} of the margin between chosen and rejected (at least {least})")
    return problems, warnings


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _not_numbers(folder: Path, compared: Compared, dtype: str) -> str:
    """Where a model's NaN comes from."""
    found = f"its log-probs are not numbers (NaN) at {compared.not_numbers:,} of {len(compared.logps):,} tokens"
    name = _tensor_with_nan(folder)
    if name is None:
        return f"{found}: its weights are finite, so what it computes in {dtype} overflows; take another --dtype"
    return f"{found}: {name} holds values that are not finite, which {dtype} may have no room for"


def _tensor_with_nan(folder: Path) -> str | None:
    """The first tensor of a model folder that holds NaN or an infinity."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if not tensors.get_tensor(name).isfinite().all():
                    return str(name)
    return None
