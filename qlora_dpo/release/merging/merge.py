"""Merges a LoRA adapter into its base: one plain model folder that any transformers program loads.

Which base is right differs by model: the dequantized one is what the adapter was trained on, the original one is what
quantization blurred. So each candidate is written and measured against the trained adapter, and the best one stays.
Never into NF4: its steps are larger than a DPO update, which would round away.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.config.release import MergeOptions
from qlora_dpo.errors import ModelError, UsageError
from qlora_dpo.files.guard import refuse_used_folder
from qlora_dpo.models.loading import choose_device
from qlora_dpo.release.artefact import Artefact, open_artefact, say_what_is_assumed
from qlora_dpo.release.cards.card import write_card
from qlora_dpo.release.fidelity.measuring import measure
from qlora_dpo.release.fidelity.table import Measured, best, table, update_summary
from qlora_dpo.release.fidelity.yardstick import Yardstick, open_yardstick
from qlora_dpo.release.merging.weights import TYPES, Merge, OutOfRange, Recipe, prepare_merge, write_merged
from qlora_dpo.release.staging import require_space, staged
from qlora_dpo.training.folder.owned import is_run
from qlora_dpo.training.folder.run_folder import write_atomically

REPORT = "merge_report.json"


def merge(options: MergeOptions) -> None:
    """The `merge` command: adapter plus base becomes a plain model folder, the best of the candidates.

    Raises:
        StorageError, ModelError: adapter or base cannot be read or do not fit, or the disk is too small; or every
            candidate loses too much of the adapter.
        UsageError: the run is unfinished, or the output folder is in use.
    """
    _refuse_unmeasured_choice(options)
    refuse_used_folder(options.output)
    artefact = open_artefact(options.adapter, base_model=options.base_model, allow_unfinished=options.allow_unfinished)
    say_what_is_assumed(artefact)
    device = choose_device(options.use_cpu)
    prepared = prepare_merge(artefact, device)
    recipes = recipes_of(prepared, options.base, options.dtype)
    _require_room(prepared, recipes, options)
    with staged(options.output) as folder:
        if options.measure:
            chosen, report = _write_best(prepared, recipes, folder, device, options)
            _write_json(folder / REPORT, report)
        else:
            chosen = recipes[0].name
            write_merged(prepared, recipes[0], folder, options.max_shard_size)
        write_card(folder, options.output.name, artefact.run.path if artefact.run else None)
    if options.measure and artefact.run is not None and is_run(artefact.run.path):
        with suppress(OSError):  # a run may be read-only; the merged folder has the report
            _write_json(artefact.run.path / REPORT, report)
    print(f"Merged {options.adapter} into {artefact.origin.base}: {options.output} ({chosen}).")


def recipes_of(prepared: Merge, base: str, dtype: str) -> list[Recipe]:
    """The candidates: each base that there is, in each type that is asked for.

    Raises:
        UsageError: the original base is asked for, and there is none.
        UsageError, ModelError: the base as training held it cannot be formed here.
    """
    if base == "original" and prepared.base.comes_quantized:
        raise UsageError(
            f"--base original: {prepared.artefact.origin.base} comes quantized, so there is no 16-bit base here. Use "
            "--base train."
        )
    bases: Sequence[Any] = prepared.bases if base == "auto" else [base]
    if "train" in bases:
        prepared.base.check_holdable()
    types = prepared.base.half_types if dtype == "auto" else (TYPES[dtype],)
    return [Recipe(one, type_) for type_ in types for one in bases]


def _write_best(
    prepared: Merge, recipes: Sequence[Recipe], folder: Path, device: torch.device, options: MergeOptions
) -> tuple[str, dict[str, Any]]:
    """Write and measure each candidate, at most two of them on the disk at a time; the best one's files end up in the
    folder. Returns its name and the report.

    Raises:
        ModelError: every one of them loses too much.
    """
    measured: list[Measured] = []
    with open_yardstick(
        prepared.artefact, dataset=options.dataset, max_pairs=options.fidelity_pairs, device=device, folder=folder
    ) as yardstick:
        kept: Measured | None = None
        for recipe in recipes:
            one = _written_and_measured(prepared, recipe, yardstick, folder, device, options.max_shard_size)
            if one is None:
                continue
            measured.append(one)
            better = one if kept is None else best([kept, one], force=True)
            if kept is not None:
                shutil.rmtree(folder / (one if better is kept else kept).name)
            kept = better
        chosen = best(measured, options.force)
        print(table(yardstick, measured, chosen.name if chosen else None))
        if chosen is None:
            raise _all_refused(measured, options)
        report = _report(prepared.artefact, yardstick.facts(), measured, recipes, chosen)
    for file in (folder / chosen.name).iterdir():
        file.rename(folder / file.name)
    (folder / chosen.name).rmdir()
    return chosen.name, report


def _written_and_measured(
    prepared: Merge, recipe: Recipe, yardstick: Yardstick, folder: Path, device: torch.device, max_shard_size: str
) -> Measured | None:
    """None where the storage type cannot hold a weight of the merged model."""
    place = folder / recipe.name
    print(f"Merging and measuring: {recipe.name}.", file=sys.stderr)
    try:
        updates = write_merged(prepared, recipe, place, max_shard_size)
    except OutOfRange as error:
        shutil.rmtree(place)
        print(f"{recipe.name} is no candidate: {error}", file=sys.stderr)
        return None
    fidelity = measure(yardstick, place, device)
    return Measured(recipe.name, fidelity, updates, sum(file.stat().st_size for file in place.iterdir()))


def _all_refused(measured: Sequence[Measured], options: MergeOptions) -> ModelError:
    if not measured:
        return ModelError("no candidate can be stored. Use --dtype bfloat16 or float32.")
    reasons = "\n".join(f"  {one.name}: {problem}" for one in measured for problem in one.fidelity.problems)
    others = "" if options.base == options.dtype == "auto" else ", try --base auto and --dtype auto or float32"
    return ModelError(
        f"nothing was written, for every merged model would lose too much of what was trained:\n{reasons}\nRelease "
        f"the adapter alone{others}, or write the best of them all the same with --force."
    )


def _report(
    artefact: Artefact, yardstick: dict[str, Any], measured: Sequence[Measured], recipes: Sequence[Recipe],
    chosen: Measured,
) -> dict[str, Any]:  # fmt: skip
    """What is kept of the measurement, in the merged folder and in the run's."""
    by_name = {recipe.name: recipe for recipe in recipes}
    return {
        "chosen": chosen.name,
        "forced": chosen.fidelity.is_refused,
        "adapter": str(artefact.named.resolve()),
        "run": None if artefact.run is None else str(artefact.run.path.resolve()),
        "base_model": artefact.origin.base,
        "base_revision": artefact.origin.revision,
        "yardstick": yardstick,
        "candidates": [
            {
                "name": one.name, "base": by_name[one.name].base, "dtype": by_name[one.name].dtype_name,
                "bytes": one.size, **asdict(one.fidelity), **update_summary(one.updates),
            }
            for one in measured
        ],
        "layers": [asdict(update) for update in chosen.updates],
    }  # fmt: skip


def _refuse_unmeasured_choice(options: MergeOptions) -> None:
    if not options.measure and "auto" in (options.base, options.dtype):
        raise UsageError(
            "--measure false leaves nothing to choose by: name --base train or original, and --dtype bfloat16, float16 "
            "or float32."
        )


def _require_room(prepared: Merge, recipes: Sequence[Recipe], options: MergeOptions) -> None:
    """The best so far and the next one lie side by side."""
    sizes = sorted(prepared.size(recipe.dtype) for recipe in recipes)
    prepared.shards(recipes[0].dtype, options.max_shard_size)  # a size that is none is found before the work
    count = min(2, len(sizes))
    doing = f"merging {options.adapter}" + (", two candidates at a time," if count == 2 else "")
    require_space(options.output, sum(sizes[-count:]), doing)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_atomically(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
