"""What a GGUF file says of each family, tensor by tensor and key by key, in llama.cpp's terms (its conversion/*.py)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import FAMILIES, fields, gemma_tokenizer, make_family, write

from qlora_dpo.cli import main
from qlora_dpo.release.gguf.export import _name

ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj"}  # fmt: skip
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
BLOCKS = {
    "qwen3": ATTENTION | MLP | NORMS | QK_NORMS,
    "mistral": ATTENTION | MLP | NORMS,
    "gemma3": ATTENTION | MLP | QK_NORMS | {
        "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
    },
    "phi3": NORMS | {
        "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
}  # fmt: skip
SAID = {
    "qwen3": {"general.architecture": "qwen3", "qwen3.attention.key_length": 32, "tokenizer.ggml.pre": "qwen2"},
    "mistral": {
        "general.architecture": "llama", "llama.attention.value_length": 32, "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 32, "tokenizer.ggml.model": "llama", "general.name": "model",
    },
    "gemma3": {
        "gemma3.attention.sliding_window": 16, "gemma3.rope.freq_base": 1e6, "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0, "gemma3.attention.key_length": 32,
        "tokenizer.ggml.add_space_prefix": False,
    },
    "phi3": {
        "general.name": "model (phi-3)", "phi3.attention.sliding_window": 512, "phi3.rope.dimension_count": 12,
        "phi3.rope.scaling.original_context_length": 256, "phi3.rope.scaling.attn_factor": pytest.approx(1.25**0.5),
    },
}  # fmt: skip
ENDS = {"qwen3": "<|im_end|>", "gemma3": "<end_of_turn>", "phi3": "<|end|>"}


@pytest.fixture(scope="module")
def folders(sentencepiece_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The families' folders."""
    root = tmp_path_factory.mktemp("families")
    return {family: make_family(family, root / family / "model", sentencepiece_file) for family in FAMILIES}


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file

    return {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}


def tensors(file: Path) -> dict[str, np.ndarray]:
    from gguf import GGUFReader

    return {tensor.name: tensor.data.astype(np.float32) for tensor in GGUFReader(file).tensors}


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head, then row i of its second half, and so on."""
    size = len(rows) // heads
    places = [
        head * size + half * size // 2 + row for head in range(heads) for row in range(size // 2) for half in (0, 1)
    ]
    return rows[places]


def expected_of(family: str, folder: Path) -> dict[str, np.ndarray]:
    """What llama.cpp's own converter would write, by name."""
    known, config = weights(folder), json.loads((folder / "config.json").read_text())
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if not config["tie_word_embeddings"]:
        names["output.weight"] = "lm_head.weight"
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in BLOCKS[family].items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    found = {theirs: known[ours] for theirs, ours in names.items()}
    for name, values in found.items():
        if family == "gemma3" and "norm" in name:
            found[name] = values + 1
        if family == "mistral" and ("attn_q." in name or "attn_k." in name):
            found[name] = in_pairs(values, 4 if "attn_q." in name else 2)
    if family == "phi3":
        rope = config["rope_parameters"]
        found |= {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_keys(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write(folders[family], tmp_path / "model.gguf")
    expected, found, said = expected_of(family, folders[family]), tensors(tmp_path / "model.gguf"), fields(
        tmp_path / "model.gguf"
    )  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        np.testing.assert_allclose(found[name], values, atol=2e-4, rtol=2e-3, err_msg=name)
    assert {name: said[name] for name in SAID[family]} == SAID[family]
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    assert said["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    end = ENDS.get(family)
    assert said.get("tokenizer.ggml.eot_token_id") == (tokenizer.convert_tokens_to_ids(end) if end else None)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "every 6th"),
        ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "softcapping"),
        ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 5e4}}}, "50000.0"),
        ("qwen3", {"attention_bias": True}, "biases in attention"),
        ("qwen3", {"use_sliding_window": True}, "sliding-window attention"),
        ("mistral", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rotary_factor=0.5"),
    ],
)  # fmt: skip
def test_what_llama_cpp_cannot_say_is_refused(
    family: str, changes: dict[str, Any], reason: str, folders: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = shutil.copytree(folders[family], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert main(["release", "gguf", str(folder), "--output", str(tmp_path / "model.gguf")]) == 65
    assert reason in capsys.readouterr().err


def test_what_llama_cpp_does_otherwise_is_said(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folders["phi3"], tmp_path / "model.gguf")
    said = capsys.readouterr().out
    assert "attends to the last 512 tokens" in said
    assert "context (-c) is above 256 tokens" in said


def test_the_text_part_of_a_gemma_3_that_sees(
    sentencepiece_file: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its vision tower stays out, and the rest is what the model of text alone has."""
    from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

    text = AutoConfig.from_pretrained(folders["gemma3"])
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    own = {name.removeprefix("model."): torch.from_numpy(values) for name, values in weights(folders["gemma3"]).items()}
    model.model.language_model.load_state_dict(own)
    model.save_pretrained(tmp_path / "seeing")
    gemma_tokenizer(sentencepiece_file).save_pretrained(tmp_path / "seeing")
    write(tmp_path / "seeing", tmp_path / "model.gguf")
    expected, found = expected_of("gemma3", folders["gemma3"]), tensors(tmp_path / "model.gguf")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-4, rtol=2e-3, err_msg=name)


def test_a_name_makes_control_tokens_swallow_spaces_where_they_do() -> None:
    assert [_name(name, swallows=True) for name in ("mine", "Phi-3-mini", "phi3")] == [
        "mine (phi-3)",
        "Phi-3-mini",
        "phi3",
    ]
    assert [_name(name, swallows=False) for name in ("mine", "my-Phi-3-like")] == ["mine", "my-phi_3-like"]


def test_transformers_is_not_asked_for_what_it_reads_otherwise(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "llama_cpp" else own(name, *more)
    )
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert main(["release", "check", str(folders["qwen3"]), "--gguf", str(file)]) == 2
    assert "Install llama-cpp-python" in capsys.readouterr().err
