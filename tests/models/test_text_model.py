"""Of a base that sees, the text model is trained and nothing else; one that gives no language model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.errors import ModelError
from qlora_dpo.models.activation_checkpointing import decoder_layers
from qlora_dpo.models.loading import check_cpu_quantizable, refuse_untrainable
from qlora_dpo.models.lora import add_adapter
from qlora_dpo.models.text_model import beside_text, beside_text_pattern

TEXT = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "num_channels": 3,
}  # fmt: skip


def seeing_gemma() -> Any:
    """Gemma 3 with a vision tower that is deeper than its text model, of rows that a CPU cannot quantize."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    config = Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=1, image_token_index=5, boi_token_index=6,
        eoi_token_index=7,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.05)
    return model


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "fc1"], ["v_proj"]])
def test_no_adapter_beside_the_text_model(targets: list[str], tmp_path: Path) -> None:
    from peft import PeftModel

    base = seeing_gemma()
    assert beside_text(base) == ["model.vision_tower", "model.multi_modal_projector"]
    policy = add_adapter(base, r=2, alpha=2, dropout=0.0, target_modules=targets, seed=0)
    adapted = [name for name, _ in policy.named_parameters() if "lora_" in name]
    assert adapted and all(".language_model." in name for name in adapted)
    assert len(decoder_layers(policy)) == 2
    policy.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(seeing_gemma(), str(tmp_path))
    assert [name for name, _ in plain.named_parameters() if "lora_" in name] == adapted


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_language_models_are_text_throughout(family: str) -> None:
    shapes: dict[str, dict[str, Any]] = {
        "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2},
        "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    }
    model = tiny_model(family, **shapes.get(family, {}))
    assert beside_text(model) == [] and beside_text_pattern(model) is None
    assert len(decoder_layers(model)) == 2


def test_rows_of_a_tower_that_never_runs_do_not_matter_on_a_cpu() -> None:
    check_cpu_quantizable(seeing_gemma().config)


@pytest.mark.parametrize(
    "kind",
    [
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "mistral3", "paligemma", "idefics3", "internvl", "glm4v",
        "phi4_multimodal", "git", "t5", "vit",
    ],
)  # fmt: skip
def test_what_gives_no_language_model_is_refused_in_one_sentence(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(ModelError, match=f"makes no language model .*model_type is {kind}") as refused:
        refuse_untrainable("some/base", CONFIG_MAPPING[kind](), None)
    assert ("more than text" in str(refused.value)) == (kind not in ("t5", "vit"))


@pytest.mark.slow
def test_its_text_model_trains_goes_on_merges_and_is_planned(
    tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    seeing_gemma().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    options = ["--model_name_or_path", str(base), "--dataset", str(pairs_file), "--max_steps", "2"]
    assert main(["plan", *options, "--use_cpu", "true"]) == 0
    options += ["--output_dir", str(run), "--learning_rate", "1e-3", "--activation_checkpointing", "full"]
    assert main(["train", *options]) == 0
    trained = load_file(run / "adapter_model.safetensors")
    assert trained and not [name for name in trained if "vision" in name]
    assert all(weight.any() for name, weight in trained.items() if "lora_B" in name)
    assert main(["merge", "--adapter", str(run), "--output", str(tmp_path / "merged")]) == 0
