"""What a saved adapter was trained on, and loading it again the same way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from qlora_dpo.config.training import ModelOptions, quantization_of
from qlora_dpo.data.template_clock import pin_date
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.models.loading import choose_device, load_base, load_tokenizer
from qlora_dpo.models.lora import check_adapter_folder, load_adapter
from qlora_dpo.training.folder.content import model_fingerprint, refuse_other_base
from qlora_dpo.training.folder.run_folder import CONFIG, STATUS, RunFolder

BASE_HELD = "base_quantization.json"  # beside an adapter that `release adapter` wrote


@dataclass(frozen=True)
class TrainedOn:
    """The base of an adapter and how it was held in memory."""

    adapter: Path
    base: str
    revision: str | None
    quantization: dict[str, Any] | None
    dtype: torch.dtype
    is_known: bool
    """False for a foreign adapter, where the usual QLoRA settings are assumed."""
    noted_base: str | None
    """What the run noted to know its base again: a hash of the weights, or the commit of a Hub model."""


def trained_on(adapter: Path, base_model: str | None = None) -> TrainedOn:
    """Read adapter_config.json, and config.yaml or base_quantization.json where this tool left one.

    Raises:
        StorageError, ModelError: see `check_adapter_folder`.
        UsageError: the adapter names no base and `base_model` is not given.
    """
    adapter_config = check_adapter_folder(adapter)
    base = base_model or adapter_config.get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{adapter}/adapter_config.json names no base model: name it with --base_model.")
    config_file = next((path for path in (adapter / CONFIG, adapter.parent / CONFIG) if path.is_file()), None)
    model, noted = ModelOptions(), None
    if config_file is not None:
        settings = yaml.safe_load(config_file.read_text(encoding="utf-8"))
        model = ModelOptions(**{name: settings[name] for name in ModelOptions.__dataclass_fields__ if name in settings})
        noted = RunFolder(config_file.parent).status().get("content", {}).get("model_name_or_path")
    held = None if config_file else base_held(adapter)
    quantization, dtype = held or (
        quantization_of(model),
        torch.float32 if model.dtype == "float32" else torch.bfloat16,
    )
    return TrainedOn(
        adapter=adapter,
        base=str(base),
        revision=None if base_model else adapter_config.get("revision"),
        quantization=quantization,
        dtype=dtype,
        is_known=held is not None or config_file is not None,
        noted_base=noted,
    )


def base_held(folder: Path) -> tuple[dict[str, Any] | None, torch.dtype] | None:
    """The quantization and the type that base_quantization.json names; None where there is no such file.

    Raises:
        StorageError: it cannot be read.
    """
    file = folder / BASE_HELD
    if not file.is_file():
        return None
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        dtype: torch.dtype = getattr(torch, held["dtype"])
        return held["quantization"], dtype
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{file} cannot be read ({error!r}). Export the adapter anew.") from error


def load_trained(adapter: Path, *, base_model: str | None = None, use_cpu: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer): the adapter on its base, quantized as in training; the adapter can be switched off."""
    origin = trained_on(adapter, base_model)
    base = load_base_as_trained(origin, choose_device(use_cpu))
    return load_adapter(base, adapter, trainable=False).eval(), load_tokenizer_of(adapter, origin)


def load_base_as_trained(origin: TrainedOn, device: torch.device) -> Any:
    """The base of an adapter, held as in training.

    Raises:
        ModelError: it is another one than the run noted; see `load_base` for more.
    """
    refuse_other_base(origin.adapter, origin.base, origin.noted_base, model_fingerprint(origin.base, origin.revision))
    return load_base(
        origin.base, device=device, revision=origin.revision, quantization=origin.quantization, dtype=origin.dtype
    )


def load_tokenizer_of(adapter: Path, origin: TrainedOn) -> Any:
    """The tokenizer saved with the adapter (its chat template is the one trained with), else the base's."""
    has_own = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter)) if has_own else load_tokenizer(origin.base, origin.revision)
    run = next((path for path in (adapter, adapter.parent) if (path / STATUS).is_file()), None)
    pin_date(tokenizer, None if run is None else RunFolder(run).chat_template_date())
    return tokenizer
