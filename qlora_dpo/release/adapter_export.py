"""`release adapter`: the trained adapter alone, as any PEFT program loads it, and a note of how its base was held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.config.release import AdapterExportOptions
from qlora_dpo.errors import ModelError
from qlora_dpo.files.guard import refuse_used_folder
from qlora_dpo.release.artefact import Artefact, open_artefact
from qlora_dpo.release.cards.card import write_card
from qlora_dpo.release.staging import require_space, staged
from qlora_dpo.release.tokenizer_files import write_tokenizer
from qlora_dpo.training.trained_on import BASE_HELD

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(options: AdapterExportOptions) -> None:
    """The `release adapter` command: weights, config, tokenizer, card; no checkpoint and no state of the training.

    Raises:
        StorageError, ModelError: the adapter or its tokenizer cannot be read, or the folder cannot be written.
        UsageError: the run is unfinished, or the output folder is in use.
    """
    refuse_used_folder(options.output)
    refuse_whole_model(options.adapter)
    artefact = open_artefact(options.adapter, allow_unfinished=options.allow_unfinished)
    source = artefact.adapter / WEIGHTS
    require_space(options.output.parent, 2 * source.stat().st_size, f"The adapter of {artefact.named}")
    base = options.base_model or artefact.origin.base
    with staged(options.output) as folder:
        dtype = _write_weights(source, folder / WEIGHTS, options.dtype)
        revision = None if options.base_model else artefact.origin.revision
        named = {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
        _write(folder / CONFIG, artefact.adapter_config | named)
        _write(folder / BASE_HELD, _held(artefact, base, revision))
        write_tokenizer(artefact, folder)
        write_card(folder, options.output.name, None if artefact.run is None else artefact.run.path)
    print(f"{options.output}: the adapter of {artefact.named} on {base} ({dtype}).")
    if Path(base).expanduser().is_dir():
        print(f"It names {base}, which only this machine has: name the base's Hub id with --base_model for others.")


def refuse_whole_model(folder: Path) -> None:
    """Refuse a model where an adapter is asked for.

    Raises:
        ModelError: naming what it is.
    """
    if (folder / "config.json").is_file() and not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} is a whole model, not an adapter. Name the run that was merged into it.")


def _write_weights(source: Path, target: Path, asked: str | None) -> str:
    """The adapter's tensors, in another type where one is asked for; returns the type that they have now."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    if asked is not None:
        dtype = getattr(torch, asked)
        largest = max(float(tensor.abs().max()) for tensor in tensors.values() if tensor.numel())
        if largest > torch.finfo(dtype).max:
            raise ModelError(f"{source} holds {largest:.3g}, more than {asked} can. Use --dtype bfloat16.")
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, target, metadata={"format": "pt"})
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))


def _held(artefact: Artefact, base: str, revision: str | None) -> dict[str, Any]:
    """How the base was held while the adapter was trained, in the words of transformers' BitsAndBytesConfig."""
    origin = artefact.origin
    quantization = origin.quantization and {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in origin.quantization.items()
    }
    return {
        "base_model": base,
        "revision": revision,
        "quantization": quantization,
        "dtype": str(origin.dtype).removeprefix("torch."),
        "is_known": origin.is_known,
        "adapter": str(artefact.named.absolute()),
    }


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
