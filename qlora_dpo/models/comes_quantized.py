"""Bases whose files hold quantized weights already: which of them are trained here, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qlora_dpo.errors import ModelError, UsageError

BITSANDBYTES = "bitsandbytes"
NAMES = {"fp8": "FP8", "gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4"}  # others are called as config.json calls them
DEQUANTIZABLE = {"fp8", "mxfp4"}  # transformers makes 16 bit of these while it loads them


def format_of(config: Any) -> str | None:
    """The `quant_method` of a base that comes quantized; None for one in 16 or 32 bit."""
    own = _settings(config)
    if not own:
        return None
    is_old = own.get("load_in_4bit") or own.get("load_in_8bit")  # bitsandbytes once left its name out
    return str(own.get("quant_method") or (BITSANDBYTES if is_old else "an unnamed method"))


def refuse_unusable_format(name: str, config: Any, quantization: dict[str, Any] | None) -> None:
    """Refuse a base that comes quantized and cannot be held as asked for.

    Args:
        quantization: keyword arguments of transformers' `BitsAndBytesConfig`, or None for 16 or 32 bit.

    Raises:
        ModelError: it comes in another format than bitsandbytes'.
        UsageError: it comes in bitsandbytes' format, in other bits than asked for.
    """
    found = format_of(config)
    if found is None or (found in DEQUANTIZABLE and quantization is None):
        return
    if found == BITSANDBYTES:
        _refuse_other_bits(name, config, quantization)
        return
    original = _original_of(name)
    ways = [f"name the base in 16 bit that it was made of{f' ({original}, by its README.md)' if original else ''}"]
    if found in DEQUANTIZABLE:
        ways.append(
            "hold it in 16 bit, with that much memory, by --load_in_4bit false (`merge` cannot write such a base: "
            "release the adapter alone)"
        )
    raise ModelError(
        f"{name} comes quantized as {NAMES.get(found, found)}, by its config.json. Here a base is quantized from 16 "
        f"bit, or comes from bitsandbytes: {', or '.join(ways)}."
    )


def dequantize_on_loading(config: Any) -> None:
    """Let transformers make 16 bit of a base that it can do that for, on every device: training needs it."""
    if format_of(config) in DEQUANTIZABLE:
        config.quantization_config = _settings(config) | {"dequantize": True}


def hold_dequantized(model: Any, dtype: torch.dtype) -> None:
    """Hold in `dtype` also what such a base has beside its quantized weights, which transformers leaves in the type of
    the file; but for the parameters that the architecture wants in float32."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    in_float32 = build_glob_alternation(list(plan))[0] if plan else None
    for name, parameter in model.named_parameters():
        if in_float32 is None or not in_float32.search(name):
            parameter.data = parameter.data.to(dtype)


def _refuse_other_bits(name: str, config: Any, quantization: dict[str, Any] | None) -> None:
    bits = 8 if _settings(config).get("load_in_8bit") else 4
    asked = quantization or {}
    if asked.get(f"load_in_{bits}bit"):
        return
    options = "--load_in_8bit true" if bits == 8 else "--load_in_4bit true, the default, without --load_in_8bit"
    raise UsageError(
        f"{name} comes in {bits} bit from bitsandbytes and cannot be held otherwise: use {options}, or name the base "
        "in 16 bit that it was made of."
    )


def _settings(config: Any) -> dict[str, Any]:
    """What the config says about quantization; multimodal ones may say it of their text part."""
    for part in (config, config.get_text_config()):
        own = getattr(part, "quantization_config", None)
        if own:
            return dict(own if isinstance(own, dict) else own.to_dict())
    return {}


def _original_of(name: str) -> str | None:
    """The base that a quantized one was made of, where its model card names it."""
    from huggingface_hub import ModelCard

    card = Path(name).expanduser() / "README.md"
    try:
        found = ModelCard.load(card).data.get("base_model") if card.is_file() else None
    except Exception:  # any text may be in a README
        return None
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, str) else None
