"""Whether a checkpoint holds all weights of its model and nothing else.

Transformers fills what is missing, or has another shape, with random numbers, prints a table and goes on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from qlora_dpo.errors import ModelError
from qlora_dpo.models.weight_files import weight_files

SHOWN = 3  # names in a message


@contextmanager
def loading_reports() -> Iterator[list[Any]]:
    """The report of each model that transformers loads within this block: it neither prints them nor raises by them.

    What `output_loading_info=True` returns lacks the weights that could not be put together, such as experts.
    """
    from transformers import modeling_utils

    reports: list[Any] = []
    module: Any = modeling_utils
    own = module.log_state_dict_report

    def keep(*_: Any, loading_info: Any, **__: Any) -> None:
        reports.append(loading_info)

    module.log_state_dict_report = keep
    try:
        yield reports
    finally:
        module.log_state_dict_report = own


def refuse_other_weights(name: str, model: Any, report: Any) -> None:
    """Refuse a model whose checkpoint lacks weights, has them in other shapes, or has more than the model.

    Tied weights, buffers that are not saved and what the model's class lists as ignorable are not in the report.

    Raises:
        ModelError: with their names.
    """
    mismatched = {key: (tuple(was), tuple(wanted)) for key, was, wanted in report.mismatched_keys}
    mismatched |= _misshapen(model)
    wrong = {
        "missing": report.missing_keys - report.conversion_errors.keys(),
        "incomplete": report.conversion_errors,
        "of another shape": [f"{key} ({was} instead of {wanted})" for key, (was, wanted) in mismatched.items()],
        f"unknown to {type(model).__name__}": report.unexpected_keys,
        "unreadable": report.error_msgs,
    }
    found = "; ".join(f"{what}: {_some(keys)}" for what, keys in wrong.items() if keys)
    if found:
        raise ModelError(
            f"{name} holds other weights than its config.json describes, and what is missing would be random: "
            f"{found}. Download or restore the model."
        )


def _misshapen(model: nn.Module) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Quantized weights of another shape than their layer, which transformers does not look at."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear4bit | Linear8bitLt):
            continue
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None)
        was, wanted = tuple(weight.shape if state is None else state.shape), (module.out_features, module.in_features)
        if was != wanted:
            found[f"{name}.weight"] = (was, wanted)
    return found


def say_ignored(name: str, model: Any, folder: Path) -> None:
    """Say which tensors of a checkpoint are not loaded because the model's class leaves them out on purpose: the vision
    tower of a text model, layers that predict several tokens."""
    patterns = model._keys_to_ignore_on_load_unexpected
    if not patterns:
        return
    ignorable, prefix = re.compile("|".join(f"({pattern})" for pattern in patterns)), f"{model.base_model_prefix}."
    state = model.state_dict().keys()
    ignored = [
        key
        for key in _tensor_names(folder)
        if ignorable.search(key) and not state & {key, prefix + key, key.removeprefix(prefix)}
    ]
    if ignored:
        print(f"{name}: {type(model).__name__} leaves out {_some(ignored)}.", file=sys.stderr)


def _tensor_names(folder: Path) -> Iterator[str]:
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            yield from file.keys()


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
