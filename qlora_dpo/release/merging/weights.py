"""Writes base plus adapter as a plain model folder, shard by shard; in memory there is one shard and one layer
(of experts that are stored one by one, all of a layer's).

The sum is formed in float32 and rounded once, to the storage type. Tensors keep the names that they have in the base's
files. Nothing of quantization is left: what was quantized is written dequantized.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from qlora_dpo.errors import ModelError, UsageError
from qlora_dpo.models.loading import load_config
from qlora_dpo.models.lora import embedding_names, resize_to_adapter
from qlora_dpo.release.artefact import BESIDE, INDEX, Artefact, locate_base
from qlora_dpo.release.merging.adapter_updates import AdapterUpdates
from qlora_dpo.release.merging.base_weights import SHOWN, BaseWeights, Stored, dtypes_of
from qlora_dpo.release.merging.end_tokens import write_end_tokens
from qlora_dpo.release.tokenizer_files import write_tokenizer

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Base = Literal["train", "original"]
Parted = dict[str, Tensor]
KEPT_STACKS = 2  # of experts, whose parts lie beside each other in a file: an up and a down projection
_PART = 2**22  # numbers that are compared at a time
_BESIDES = 64 * 2**20  # bytes for the tokenizer and other small files


class OutOfRange(ModelError):
    """A merged weight is larger than the storage type can hold."""


@dataclass(frozen=True)
class Recipe:
    """One way to merge: into which base, stored in which type."""

    base: Base
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """`train, bfloat16`."""
        return f"{self.base}, {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """`bfloat16`."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LayerUpdate:
    """What the adapter does to one weight, and how much of it the storage type keeps."""

    name: str
    size: float
    """Norm of the update over the norm of the weight."""
    kept: float
    """Cosine between the update and what storage leaves of it: stored weight minus the base in float32."""
    lost: float
    """Share of the numbers that are stored as the base alone would be."""


@dataclass(frozen=True)
class Output:
    """One tensor that is written: its name, the parameter that it is, and what it is made of."""

    name: str
    parameter: str
    source: Stored


@dataclass(frozen=True)
class Merge:
    """A base and an adapter that fit together, and what is to be written of them."""

    artefact: Artefact
    base: BaseWeights
    updates: AdapterUpdates
    outputs: tuple[Output, ...]
    is_untied: bool
    """The two embeddings, tied in the base's config, differ: by the adapter, or already in its files."""
    rows: int | None = None
    """Of the vocabulary, where the adapter resized it."""
    stacks: dict[tuple[str, str], tuple[Parted, Parted]] = field(default_factory=dict, compare=False)
    """The parts of the experts that were merged last, by base and parameter."""

    @property
    def bases(self) -> tuple[Base, ...]:
        """Those that there are and that differ."""
        if self.base.comes_quantized or self.base.is_held_as_stored:
            return ("train",)
        return ("original",) if self.base.lost_parts else ("train", "original")

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of the merged folder."""
        types = self.storage_types(dtype)
        return _BESIDES + sum(tensor.nbytes for tensor in self._shapes(types).values())

    def storage_types(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """In which type each tensor is written: as transformers holds it in a model of that type."""
        held = dtypes_of(self.base.config, dtype)
        stored = {output.name: self.base.stored_type(output.source) for output in self.outputs}
        return {
            output.name: held.get(output.parameter, stored[output.name])
            if stored[output.name].is_floating_point
            else stored[output.name]
            for output in self.outputs
        }

    def shards(self, dtype: torch.dtype, max_shard_size: int | str) -> Any:
        """Which tensor goes into which file, as huggingface_hub divides them.

        Raises:
            UsageError: `max_shard_size` is no size.
        """
        from huggingface_hub import split_torch_state_dict_into_shards

        try:
            return split_torch_state_dict_into_shards(
                self._shapes(self.storage_types(dtype)), max_shard_size=max_shard_size
            )
        except ValueError as error:
            raise UsageError(f"--max_shard_size {max_shard_size}: {error} Write it as 5GB or 500MB.") from error

    def _shapes(self, types: dict[str, torch.dtype]) -> dict[str, Tensor]:
        return {
            output.name: torch.empty(output.source.shape, dtype=types[output.name], device="meta")
            for output in self.outputs
        }


def prepare_merge(artefact: Artefact, device: torch.device) -> Merge:
    """Look at base and adapter without reading their weights, and decide what is written.

    Args:
        device: on which the base is quantized, as training did.

    Raises:
        StorageError, ModelError, UsageError: base and adapter cannot be merged, by name.
    """
    folder, origin = locate_base(artefact), artefact.origin
    config = load_config(str(folder))
    base = BaseWeights(folder, config, quantization=origin.quantization, dtype=origin.dtype, device=device)
    rows = resize_to_adapter(base.model, artefact.adapter)
    updates = AdapterUpdates(base.model, artefact.adapter)
    outputs = {tensor.name: Output(tensor.name, tensor.parameter, tensor) for tensor in base.tensors}
    is_untied = _settle_ties(base, updates, outputs)
    whole = {output.parameter for output in outputs.values() if output.source.is_whole}
    tied = {name for pair in base.model.all_tied_weights_keys.items() if whole & set(pair) for name in pair}
    missing = sorted(updates.changed - whole - tied - set(base.parts.separable))
    if missing:
        raise ModelError(
            f"{artefact.adapter}: the adapter changes {', '.join(missing[:SHOWN])}, which {origin.base} does not store "
            "as one tensor nor in parts that can be joined, so it cannot be merged here. Merge it with PEFT."
        )
    if rows is not None:
        _resize(artefact, base.model, updates, outputs, rows)
    return Merge(artefact, base, updates, tuple(outputs.values()), is_untied, rows)


def _resize(artefact: Artefact, model: Any, updates: AdapterUpdates, outputs: dict[str, Output], rows: int) -> None:
    """Give the embedding and the head the rows that the adapter brings.

    Raises:
        ModelError: it brings only one of them.
    """
    size, embeddings = model.get_input_embeddings().weight.shape[1], {*embedding_names(model)}
    for name, output in outputs.items():
        if output.parameter in embeddings:
            if output.parameter not in updates.replaced:
                raise ModelError(
                    f"{artefact.adapter}: its vocabulary was resized from {output.source.shape[0]:,} to {rows:,} rows, "
                    f"and it brings no {output.parameter} of that size. Save it with save_embedding_layers=True, or "
                    "merge it with PEFT."
                )
            outputs[name] = replace(output, source=replace(output.source, shape=(rows, size)))


def write_merged(merge: Merge, recipe: Recipe, folder: Path, max_shard_size: int | str) -> list[LayerUpdate]:
    """Write a complete plain model folder; returns what was done to each weight that the adapter changes.

    Raises:
        ModelError: a sum is not finite.
        OutOfRange: the storage type cannot hold a weight.
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = merge.shards(recipe.dtype, max_shard_size)
    by_name = {output.name: output for output in merge.outputs}
    types = merge.storage_types(recipe.dtype)
    measured: list[LayerUpdate] = []
    for file, names in shards.filename_to_tensors.items():
        shard = {}
        for name in names:
            shard[name], update = _stored(merge, recipe, by_name[name], types[name])
            measured += update
        save_file(shard, folder / file, metadata={"format": "pt"})
        del shard
    merge.stacks.clear()
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_config(merge, recipe, folder)
    for file in shards.filename_to_tensors:
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets nobody else read what it writes
    added = write_end_tokens(merge.artefact, merge.base.folder, folder)
    if added is not None:
        print(f"Answers ended with {added} in training: {recipe.name} stops at it too (eos_token_id).", file=sys.stderr)
    for name in BESIDE:
        if (merge.base.folder / name).is_file():
            shutil.copyfile(merge.base.folder / name, folder / name)
    write_tokenizer(merge.artefact, folder)
    return measured


def _stored(merge: Merge, recipe: Recipe, output: Output, dtype: torch.dtype) -> tuple[Tensor, list[LayerUpdate]]:
    """One tensor as it is written, and what the adapter did to it, if anything."""
    weight, merged = merged_tensor(merge, recipe, output)
    stored = _rounded(output.name, merged, dtype)
    if output.parameter not in merge.updates.changed:
        return stored, []
    name = output.parameter if output.source.is_whole else output.name
    return stored, [_measured(name, weight, merged, stored)]


def merged_tensor(merge: Merge, recipe: Recipe, output: Output) -> tuple[Tensor, Tensor]:
    """(the base's, the merged one), in float32."""
    if output.parameter in merge.base.parts.separable:
        before, after = _merged_parts(merge, recipe, output.parameter)
        return before[output.name], after[output.name]
    weight = merge.base.held(output.source) if recipe.base == "train" else merge.base.original(output.source)
    if weight.dim() and len(weight) < output.source.shape[0]:  # rows of added tokens, which the base has not
        weight = torch.cat([weight, weight.new_zeros(output.source.shape[0] - len(weight), weight.shape[1])])
    is_changed = output.parameter in merge.updates.changed
    return weight, merge.updates.merged(output.parameter, weight) if is_changed else weight


def _merged_parts(merge: Merge, recipe: Recipe, parameter: str) -> tuple[Parted, Parted]:
    """The parts that a parameter is stored in, before and after the merge."""
    key = recipe.base, parameter
    if key not in merge.stacks:
        if len(merge.stacks) == KEPT_STACKS:
            del merge.stacks[next(iter(merge.stacks))]  # the oldest
        parts, weight = merge.base.parts, merge.base.whole(parameter, as_held=recipe.base == "train")
        before = after = parts.apart(parameter, weight)
        if parameter in merge.updates.changed:
            after = parts.apart(parameter, merge.updates.merged(parameter, weight))
        merge.stacks[key] = before, after
    return merge.stacks[key]


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    stored = weight.to(dtype).contiguous()
    if dtype == torch.float16 and weight.is_floating_point() and not stored.isfinite().all():
        raise OutOfRange(
            f"{name} has a weight of {weight.abs().max():.3g}, and float16 ends at 65504. Use --dtype bfloat16."
        )
    return stored


def _measured(name: str, base: Tensor, merged: Tensor, stored: Tensor) -> LayerUpdate:
    """Compare what is stored with the base, number by number, a part of the layer at a time."""
    sums, same = torch.zeros(4, dtype=torch.float64), 0
    for weight, wanted, found in zip(
        *(tensor.flatten().split(_PART) for tensor in (base, merged, stored)), strict=True
    ):
        same += int((found == weight.to(found.dtype)).sum())
        weight, update, left = weight.double(), wanted.double() - weight, found.double() - weight
        sums += torch.stack([weight @ weight, update @ update, left @ left, update @ left])
    of_base, of_update, of_left, product = sums.tolist()
    if not of_update:
        return LayerUpdate(name, 0.0, 1.0, 0.0)  # nothing was there to be lost
    kept = product / math.sqrt(of_update * of_left) if of_left else 0.0
    size = math.sqrt(of_update / of_base) if of_base else 1.0
    return LayerUpdate(name, size, kept, same / base.numel())


def _settle_ties(base: BaseWeights, updates: AdapterUpdates, outputs: dict[str, Output]) -> bool:
    """See to it that tied parameters are stored once, and both where they differ; returns whether any do."""
    is_untied = False
    for target, source in base.model.all_tied_weights_keys.items():
        there = {output.parameter: output for output in outputs.values() if output.source.is_whole}
        found = [there[name] for name in (source, target) if name in there]
        changed = updates.changed & {target, source}
        differ = len(found) == 2 and not torch.equal(*(base.stored(output.name) for output in found))
        if differ or (changed and not (len(changed) == 2 and updates.keeps_ties)):
            _refuse_other_ties(base.model, target, source)
            is_untied = True
            for parameter in {target, source} - there.keys():
                outputs[parameter] = Output(parameter, parameter, found[0].source)
        elif len(found) == 2:
            del outputs[found[1].name]
    return is_untied


def _refuse_other_ties(model: Any, target: str, source: str) -> None:
    """Only the tie of the two embeddings can be undone by the config."""
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    pair = {id(model.get_submodule(name.rpartition(".")[0])) for name in (target, source)}
    if pair != embeddings:
        raise ModelError(f"{target} and {source} are tied, and no config can say that the adapter made them differ.")


def _write_config(merge: Merge, recipe: Recipe, folder: Path) -> None:
    """The base's config.json without quantization and foreign code, with the type that is stored."""
    config = json.loads((merge.base.folder / "config.json").read_text(encoding="utf-8"))
    for name in ("quantization_config", "auto_map", "_name_or_path"):
        config.pop(name, None)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or {"dtype", "torch_dtype"} & part.keys():
            part.pop("torch_dtype", None)
            part["dtype"] = recipe.dtype_name
        if merge.rows is not None and "vocab_size" in part:
            part["vocab_size"] = merge.rows
        if merge.is_untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
