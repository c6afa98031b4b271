"""The run folder's README.md: a model card with what was trained, on what, and what came out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

CARD = """---
{metadata}---

# {name}

LoRA adapter for `{base}`, trained with DPO (arXiv 2305.18290) by qlora_dpo {version}.

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

SHOWN = (
    "loss_type", "beta", "learning_rate", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "lora_r", "lora_alpha",
    "lora_dropout", "max_length", "max_prompt_length", "seed",
)  # fmt: skip
RESULTS = {
    "eval_rewards/accuracies": "held-out reward accuracy",
    "eval_rewards/margins": "held-out reward margin",
    "eval_loss": "held-out loss",
    "loss": "training loss",
    "rewards/accuracies": "training reward accuracy",
}


def write_model_card(
    path: Path,
    *,
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
        "tags": ["dpo", "lora", "qlora_dpo"],
    }
    step = last_metrics.get("step")
    results = [f"- {title}: {last_metrics[key]:.4g}" for key, title in RESULTS.items() if key in last_metrics]
    held = ", ".join(f"{key}={value}" for key, value in (quantization or {}).items()) or "not quantized"
    card = CARD.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=name,
        base=base,
        version=version,
        results="\n".join([f"After {step} steps:", "", *results]),
        data="\n".join(f"- {line}" for line in data_summary),
        settings="\n".join(f"- `{option}`: {options[option]}" for option in SHOWN),
        held=held,
    )
    path.write_text(card, encoding="utf-8")
