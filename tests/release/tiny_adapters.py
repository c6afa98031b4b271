"""Tiny bases and adapters of every kind, saved as a user would have them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer, with_lora

from qlora_dpo.config.training import TrainConfig
from qlora_dpo.models import lora
from qlora_dpo.release.artefact import open_artefact
from qlora_dpo.release.merging.weights import LayerUpdate, Recipe, prepare_merge, write_merged
from qlora_dpo.training.folder.checkpoints import save_checkpoint
from qlora_dpo.training.folder.content import weights_fingerprint

CPU = torch.device("cpu")
ORIGINAL = Recipe("original", torch.float32)
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}


def save_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random base of the family with a tokenizer."""
    tiny_model(family, **changes).to(dtype).save_pretrained(folder, max_shard_size=changes.get("shard", "60KB"))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, **options: Any) -> Any:
    """Write a PEFT adapter on the base whose every trained number matters; returns the model with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings
        policy: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        policy.save_pretrained(folder)
    return policy


def save_run(folder: Path, base: Path, dataset: Path, **options: Any) -> Path:
    """What `train` leaves of a finished run on this base, without training: a random adapter."""
    policy = with_lora(tiny_model(), r=4)
    policy.peft_config["default"].base_model_name_or_path = str(base)
    folder.mkdir()
    lora.save_adapter(policy, folder)
    tiny_tokenizer().save_pretrained(folder)
    named = {"model_name_or_path": str(base), "dataset": str(dataset), "eval_fraction": 0.2, "dtype": "float32"}
    (folder / "config.yaml").write_text(yaml.safe_dump(TrainConfig().flat() | named | options))
    content = {"model_name_or_path": weights_fingerprint(base)}
    status = {"status": "finished", "step": 6, "total_steps": 6, "content": content}
    (folder / "run.json").write_text(json.dumps(status))
    save_checkpoint(
        folder, 6, save_adapter=lambda place: lora.save_adapter(policy, place), optimizer={}, rng={}, state={},
        options_hash="",
    )  # fmt: skip
    return folder


def logits(model: Any) -> torch.Tensor:
    """Of fixed made-up tokens."""
    ids = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def merged(folder: Path, adapter: Path, recipe: Recipe = ORIGINAL) -> tuple[dict[str, torch.Tensor], list[LayerUpdate]]:
    """Tensors of the merged folder, by name, and what was measured while it was written."""
    updates = write_merged(prepare_merge(open_artefact(adapter), CPU), recipe, folder, "50KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    return {name: tensor for file in files for name, tensor in load_file(file).items()}, updates
