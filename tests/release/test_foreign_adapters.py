"""What other tools' adapters and bases bring: added tokens, names of classes, end tokens of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from release.tiny_adapters import logits, save_adapter, save_base
from safetensors.torch import load_file, save_file

from qlora_dpo.errors import ModelError
from qlora_dpo.models.loading import load_base
from qlora_dpo.models.lora import load_adapter
from qlora_dpo.release.artefact import open_artefact
from qlora_dpo.release.merging.weights import LayerUpdate, Recipe, prepare_merge, write_merged

CPU = torch.device("cpu")


def merged(folder: Path, adapter: Path) -> list[LayerUpdate]:
    return write_merged(prepare_merge(open_artefact(adapter), CPU), Recipe("original", torch.float32), folder, "5GB")


def test_adapter_with_added_tokens_is_merged_with_all_its_rows(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base")
    resized = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    resized.resize_token_embeddings(136, mean_resizing=False)
    resized.save_pretrained(tmp_path / "resized")
    options: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    policy = save_adapter(tmp_path / "adapter", tmp_path / "resized", **options)
    of_base(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)  # PEFT saves them twice where it sees that the vocabulary was resized
    own = [name for name in tensors if "lora" not in name]
    twice = {name.replace(".weight", ".modules_to_save.weight"): tensors[name].clone() for name in own}
    save_file(tensors | twice, file, metadata={"format": "pt"})
    assert len(twice) == 2
    updates = merged(tmp_path / "merged", tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.config.vocab_size == 136 and "model.embed_tokens.weight" in {update.name for update in updates}
    assert (logits(plain) - logits(policy)).abs().max() < 1e-5
    loaded = load_adapter(load_base(str(base), device=CPU, dtype=torch.float32), tmp_path / "adapter", trainable=False)
    assert (logits(loaded) - logits(policy)).abs().max() < 1e-5
    save_adapter(tmp_path / "half", tmp_path / "resized", **options | {"modules_to_save": ["embed_tokens"]})
    of_base(tmp_path / "half", base)
    file = tmp_path / "half" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(ModelError, match=r"resized from 128 to 136 rows, and it brings no lm_head\.weight"):
        merged(tmp_path / "other", tmp_path / "half")


def of_base(adapter: Path, base: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    named = {"base_model_name_or_path": str(base)} | changes
    (adapter / "adapter_config.json").write_text(json.dumps(config | named))


@pytest.mark.parametrize(("named", "expected"), [(2, 2), ([5, 2], [5, 2]), (5, [5, 2]), ([5, 6], [5, 6, 2])])
def test_merged_model_stops_where_answers_ended_in_training(named: Any, expected: Any, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": named, "temperature": 0.7}))
    merged(tmp_path / "merged", tmp_path / "adapter")
    found = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert found == {"eos_token_id": expected, "temperature": 0.7}


def test_model_class_that_peft_notes_is_not_imported(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    library = "transformers.models.no_such_family.modeling"
    of_base(tmp_path / "adapter", base, auto_mapping={"base_model_class": "Evil", "parent_library": library})
    merged(tmp_path / "merged", tmp_path / "adapter")
