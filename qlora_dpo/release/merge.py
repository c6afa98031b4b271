"""Merges a LoRA adapter into its base: one plain 16-bit model folder that any transformers program loads.

The sum W + (alpha / r) B A is formed in float32. `--base train` adds to the dequantized 4-bit weights, which are what
the adapter was trained on; `--base original` to the 16-bit ones. Never into NF4: its steps are larger than a DPO
update, which would round away.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.config.release import MergeOptions
from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.models.loading import load_base, model_on_meta
from qlora_dpo.models.lora import POLICY, check_adapter_folder, load_adapter
from qlora_dpo.training.folder.checkpoints import newest_valid
from qlora_dpo.training.folder.run_folder import STATUS, RunFolder
from qlora_dpo.training.trained_on import load_tokenizer_of, trained_on


def merge(options: MergeOptions) -> None:
    """The `merge` command: adapter plus base becomes a plain model folder.

    Raises:
        StorageError, ModelError: adapter or base cannot be read.
        UsageError: the run is unfinished, or the output folder is in use.
    """
    adapter = _adapter_folder(options)
    origin = trained_on(adapter, options.base_model)
    if not origin.is_known:
        print(
            "No config.yaml beside the adapter: taking NF4 with double quantization and bfloat16 as its training base."
        )
    quantization = origin.quantization if options.base == "train" else None
    base = load_base(
        origin.base,
        device=torch.device("cpu"),
        revision=origin.revision,
        quantization=quantization,
        dtype=origin.dtype if quantization else torch.float32,
    )
    model = load_adapter(base, adapter, trainable=False)
    dtype = getattr(torch, options.dtype)
    merged = merged_weights(model, dtype)
    staging = options.output.with_name(f".{options.output.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _save(model.get_base_model(), merged, dtype, staging, options.max_shard_size)
        load_tokenizer_of(options.adapter, origin).save_pretrained(staging)
        if options.output.is_dir():
            options.output.rmdir()
        staging.rename(options.output)
    except OSError as error:
        raise StorageError(f"{options.output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    held = "dequantized 4-bit base" if quantization and quantization.get("load_in_4bit") else "base"
    print(f"Merged {options.adapter} into the {held} of {origin.base}: {options.output} ({options.dtype}).")


def merged_weights(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of the plain model, in `dtype`: every quantized weight dequantized, every adapter added.

    Names are those of the base without PEFT's wrappers.
    """
    from peft.tuners.lora import LoraLayer

    causal_lm = model.get_base_model()
    merged: dict[str, Tensor] = {}
    wrapped: dict[str, Any] = {
        name: module for name, module in causal_lm.named_modules() if isinstance(module, LoraLayer)
    }
    inside = tuple(f"{name}." for name in wrapped)
    for name, layer in wrapped.items():
        weight = _plain_weight(layer.base_layer) + _update(layer)
        merged[f"{name}.weight"] = weight.to(dtype)
        if getattr(layer.base_layer, "bias", None) is not None:
            merged[f"{name}.bias"] = layer.base_layer.bias.to(dtype)
    for name, module in causal_lm.named_modules():
        if name.startswith(inside) or name in wrapped:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            weight = _plain_weight(module) if _is_quantized(module) and key == "weight" else parameter.data
            merged[f"{name}.{key}".removeprefix(".")] = weight.to(dtype)
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                merged[f"{name}.{key}".removeprefix(".")] = buffer
    return merged


def _update(layer: Any) -> Tensor:
    """(alpha / r) B A in float32, in the base weight's orientation."""
    a, b = layer.lora_A[POLICY].weight.float(), layer.lora_B[POLICY].weight.float()
    update: Tensor = (b @ a) * layer.scaling[POLICY]
    return update.T if getattr(layer, "fan_in_fan_out", False) else update


def _is_quantized(module: nn.Module) -> bool:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return isinstance(module, Linear4bit | Linear8bitLt)


def _plain_weight(module: nn.Module) -> Tensor:
    """The layer's weight in float32, dequantized where it is quantized."""
    from peft.utils.integrations import dequantize_module_weight

    weight: Tensor = dequantize_module_weight(module) if _is_quantized(module) else module.weight  # type: ignore[assignment]
    return weight.data.float()


def _adapter_folder(options: MergeOptions) -> Path:
    """The folder that holds the adapter to merge: the run's own, or its newest checkpoint with --allow_unfinished.

    Raises:
        UsageError, ModelError, StorageError: what stands against this merge.
    """
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UsageError(f"--output {options.output} is in use. Name a new or empty folder.")
    run, adapter = RunFolder(options.adapter), options.adapter
    if (options.adapter / STATUS).is_file() and not run.is_finished:
        checkpoint, _ = newest_valid(options.adapter)
        if not options.allow_unfinished or checkpoint is None:
            raise UsageError(
                f"{options.adapter} is a run that has not finished (step {run.status().get('step', 0)} of "
                f"{run.status().get('total_steps', '?')}). Run the same train command again to finish it, or merge its "
                "newest checkpoint with --allow_unfinished."
            )
        adapter = checkpoint
    if check_adapter_folder(adapter).get("use_dora"):
        raise ModelError(f"{adapter} is a DoRA adapter, which this merge does not form. Merge it with PEFT.")
    return adapter


def _save(causal_lm: Any, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path, max_shard_size: str) -> None:
    """Write a plain model: same architecture, no trace of quantization, the given weights."""
    config = type(causal_lm.config).from_dict(causal_lm.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    plain = model_on_meta(config, dtype=dtype)
    if config.get_text_config().tie_word_embeddings:
        plain.tie_weights()
    plain.load_state_dict(weights, strict=False, assign=True)
    plain.tie_weights()
    missing = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if missing:
        raise ModelError(
            f"the merge found no weights for {', '.join(missing[:3])}: this architecture is not supported."
        )
    plain.generation_config = causal_lm.generation_config
    plain.save_pretrained(folder, max_shard_size=max_shard_size)
