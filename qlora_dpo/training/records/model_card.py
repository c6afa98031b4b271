"""The run folder's README.md: a model card with what was trained, on what, and what came out.

Its parts also make the cards of what is released.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_dpo.data.files.readers import file_kind
from qlora_dpo.training.by_category import category_table
from qlora_dpo.training.records.seal import UNSEALED, is_edited, sealed

CARD = """---
{metadata}---
{seal}

# {name}

LoRA adapter for `{base}`, trained with {method} by qlora_dpo {version}.

## Result

{results}

![training curves](training_curves.png)

## Data

{data}

## Settings

{settings}

All options are in `config.yaml`, every step in `metrics.jsonl`.

## Use

{use}
"""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

METHODS = {
    "dpo": "DPO (arXiv 2305.18290)",
    "sft": "supervised fine-tuning on the assistant's turns of conversations",
}
_SHOWN = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "lora_r", "lora_alpha", "lora_dropout",
    "max_length",
)  # fmt: skip
SHOWN = {"dpo": ("loss_type", "beta", *_SHOWN, "max_prompt_length", "seed"), "sft": (*_SHOWN, "seed")}
RESULTS = {
    "eval_rewards/accuracies": "held-out reward accuracy",
    "eval_rewards/margins": "held-out reward margin",
    "eval_loss": "held-out loss",
    "eval_mean_token_accuracy": "held-out token accuracy",
}
RESULTS_OF_STEPS = {
    "loss": "training loss",
    "mean_token_accuracy": "training token accuracy",
    "rewards/accuracies": "training reward accuracy",
}
AVERAGED = 50  # lines of metrics.jsonl; one step says little, having a few pairs


def write_model_card(
    path: Path,
    *,
    objective: str = "dpo",
    name: str,
    version: str,
    base: str,
    dataset: str,
    options: dict[str, Any],
    quantization: dict[str, Any] | None,
    data_summary: Sequence[str],
    metrics: Sequence[Mapping[str, Any]],
) -> None:
    """Write the card, unless somebody wrote or edited the one that is there; metadata as the Hub reads it."""
    if is_edited(path):
        return
    metadata = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        **({"datasets": [dataset]} if is_hub_id(dataset) else {}),
        "tags": [objective, "lora", "qlora_dpo"],
    }
    card = CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        seal=UNSEALED,
        name=name,
        base=base,
        method=METHODS[objective],
        version=version,
        results="\n".join(result_lines(metrics)),
        data="\n".join(f"- {line}" for line in data_summary),
        settings="\n".join(setting_lines(options, objective)),
        use="\n".join(use_of_adapter(name, base, options.get("model_revision"), quantization, options.get("dtype"))),
    )
    path.write_text(sealed(card), encoding="utf-8")


def is_hub_id(name: str) -> bool:
    """Whether a base or a data set is one on the Hub rather than a path on this machine."""
    path = Path(name).expanduser()
    return _HUB_ID.fullmatch(name) is not None and file_kind(path) is None and not path.exists()


def result_lines(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the lines of metrics.jsonl say: the last one about held-out pairs, with a table where these have categories,
    and the last ones on average about the steps."""
    last, steps = metrics[-1], metrics[-AVERAGED:]
    results = [f"- {title}: {last[key]:.4g}" for key, title in RESULTS.items() if key in last]
    for key, title in RESULTS_OF_STEPS.items():
        if values := [row[key] for row in steps if key in row]:
            of = f" (mean of the last {len(values)} steps that were logged)" if len(values) > 1 else " (of one step)"
            results.append(f"- {title}{of}: {sum(values) / len(values):.4g}")
    table = category_table(last)
    return [f"After {last.get('step')} steps:", "", *results, *(["", *table] if table else [])]


def setting_lines(options: Mapping[str, Any], objective: str) -> list[str]:
    """The options that matter most."""
    return [f"- `{option}`: {options[option]}" for option in SHOWN[objective] if option in options]


def use_of_adapter(
    name: str, base: str, revision: str | None, quantization: Mapping[str, Any] | None, dtype: str | None
) -> list[str]:
    """How to load an adapter on its base, held as it was in training."""
    classes = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantization else "")
    settings = ", ".join(f"{key}={_quoted(value)}" for key, value in (quantization or {}).items())
    of_base = [
        _quoted(base),
        *([f"revision={_quoted(revision)}"] if revision else []),
        *(["quantization_config=quantization"] if quantization else []),
        f"dtype={_quoted('float32' if dtype == 'float32' else 'bfloat16')}",
    ]
    return [
        "The base is held as in training: " + (settings.replace('"', "") if quantization else "not quantized") + ".",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {classes}",
        "",
        *([f"quantization = BitsAndBytesConfig({settings})"] if quantization else []),
        f"base = AutoModelForCausalLM.from_pretrained({', '.join(of_base)})",
        f"model = PeftModel.from_pretrained(base, {_quoted(name)})",
        f"tokenizer = AutoTokenizer.from_pretrained({_quoted(name)})",
        "```",
    ]


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
