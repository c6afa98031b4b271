"""An export's tensors against those that the merge must give: a part that is missing shows here, however small."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qlora_dpo.errors import QloraDpoError
from qlora_dpo.release.artefact import Artefact
from qlora_dpo.release.checking.comparing import Row
from qlora_dpo.release.merging.base_weights import files_of_tensors
from qlora_dpo.release.merging.weights import Merge, Output, Recipe, merged_tensor, prepare_merge

# A faithful tensor may differ from ours where another program or device rounded a tie elsewhere.
OF_UPDATE, OF_ROUNDING = 0.1, 0.25
_DECIDING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out")


@dataclass(frozen=True)
class _Wrong:
    """A tensor that is not what the merge gives, and which share of the adapter's update it holds."""

    name: str
    held: float | None
    """None where the adapter changes nothing."""

    def __str__(self) -> str:
        if self.held is None:
            return f"{self.name} is not that of the base"
        return f"{self.name} holds {self.held:.0%} of the adapter's update"


def weights_row(artefact: Artefact, folder: Path, device: torch.device) -> Row:
    """Every tensor of an export: of a merged folder against base and adapter, of an adapter against the run's.

    A merged folder may be of the base as it is stored or as training held it.
    """
    if (folder / "adapter_config.json").is_file():
        return _row(*_of_adapter(artefact, folder))
    try:
        merge = prepare_merge(artefact, device)
        files = files_of_tensors(folder)
        found = [_of_merge(merge, base, files) for base in merge.bases]
    except QloraDpoError as error:
        return Row("weights", "not compared", f"those of the merge ({error})", None)
    if not any(total for _, total in found):
        return Row("weights", "not compared", "those of the merge (stored under other names)", None)
    return _row(*min(found, key=lambda one: len(one[0])))


def _row(wrong: list[_Wrong], total: int) -> Row:
    advice = f"{len(wrong)} tensors are not those of base and adapter: {wrong[0]}. Export it anew." if wrong else ""
    return Row("weights", f"{total - len(wrong)} of {total} tensors", "those of base and adapter", not wrong, advice)


def _of_adapter(artefact: Artefact, folder: Path) -> tuple[list[_Wrong], int]:
    """Tensors and scales of an adapter folder against those that were trained."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    wrong = [_Wrong(name, None) for name in _DECIDING if config.get(name) != artefact.adapter_config.get(name)]
    trained, exported = (load_file(place / "adapter_model.safetensors") for place in (artefact.adapter, folder))
    for name in sorted(trained.keys() | exported.keys()):
        one, other = trained.get(name), exported.get(name)
        if one is None or other is None or not torch.equal(one.to(other.dtype), other):
            wrong.append(_Wrong(name, None))
    return wrong, len(trained) + len(_DECIDING)


def _of_merge(merge: Merge, base: Any, files: Mapping[str, Path]) -> tuple[list[_Wrong], int]:
    """What is wrong in a merged folder if it is of this base, and how many tensors were compared."""
    compared = [output for output in merge.outputs if output.name in files]
    return list(_wrong(merge, base, compared, files)), len(compared)


def _wrong(merge: Merge, base: Any, outputs: list[Output], files: Mapping[str, Path]) -> Iterator[_Wrong]:
    for output in outputs:
        with safe_open(files[output.name], "pt", backend="pread") as file:
            found: Tensor = file.get_tensor(output.name)
        weight, merged = merged_tensor(merge, Recipe(base, found.dtype), output)
        if found.shape != merged.shape:
            yield _Wrong(output.name, None)
        elif (held := _held(found, weight, merged)) is not None:
            yield _Wrong(output.name, held if output.parameter in merge.updates.changed else None)


def _held(found: Tensor, weight: Tensor, merged: Tensor) -> float | None:
    """None for a tensor that is the merged one but for rounding; else the share of the update that it holds."""
    stored = merged.to(found.dtype).float()
    off, update = (found.float() - stored).flatten(), (merged.float() - weight.float()).flatten()
    size = float(update.norm())
    rounding = torch.finfo(found.dtype).eps * float(stored.norm()) if found.is_floating_point() else 0.0
    along = float(off @ update) / size**2 if size else 0.0
    if float(off.norm()) <= OF_UPDATE * size + OF_ROUNDING * rounding and abs(along) <= OF_UPDATE:
        return None
    left = (found.float() - weight.float()).flatten()
    return float(left @ update) / size**2 if size else 0.0
