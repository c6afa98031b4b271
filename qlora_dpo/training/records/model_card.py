"""The run folder's README.md: a model card with what was trained, on what, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qlora_dpo.training.by_category import category_table

CARD = """---
{metadata}---

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

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
```

The adapter was trained on a base held as: {held}.
"""

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
    "loss": "training loss",
    "mean_token_accuracy": "training token accuracy",
    "rewards/accuracies": "training reward accuracy",
}


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
    last_metrics: dict[str, Any],
) -> None:
    """Write the card; metadata as the Hub reads it."""
    metadata = {
        "base_model": base,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "datasets": [dataset],
        "tags": [objective, "lora", "qlora_dpo"],
    }
    step = last_metrics.get("step")
    results = [f"- {title}: {last_metrics[key]:.4g}" for key, title in RESULTS.items() if key in last_metrics]
    table = category_table(last_metrics)
    held = ", ".join(f"{key}={value}" for key, value in (quantization or {}).items()) or "not quantized"
    card = CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=name,
        base=base,
        method=METHODS[objective],
        version=version,
        results="\n".join([f"After {step} steps:", "", *results, *(["", *table] if table else [])]),
        data="\n".join(f"- {line}" for line in data_summary),
        settings="\n".join(f"- `{option}`: {options[option]}" for option in SHOWN[objective]),
        held=held,
    )
    path.write_text(card, encoding="utf-8")
