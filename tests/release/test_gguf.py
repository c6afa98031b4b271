"""GGUF files, read back by transformers' own reader: the same weights, ids and chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CHATML, LLAMA_2, TEXTS, byte_level, fields, plain, read, save, write
from tiny import tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.data.templates import PROMPT_TEMPLATES
from qlora_dpo.demo.base_model import BASE
from qlora_dpo.release.gguf.modelfile import NotConcatenated, fixed_text, modelfile


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped query heads, Llama 3's tokenizer and slowed rotary frequencies, its own output layer."""
    tokenizer = byte_level("llama-bpe", ["<|end|>", "<|user|>", "<|bos|>"])
    tokenizer.bos_token = "<|bos|>"
    tokenizer.chat_template = "{{ bos_token }}" + PROMPT_TEMPLATES["hh-rlhf"]
    rope = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    return save(tmp_path_factory.mktemp("models") / "llama", "llama", tokenizer, rope_parameters=rope)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases, tied embeddings, ChatML."""
    tokenizer = byte_level("qwen2", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = CHATML
    return save(tmp_path_factory.mktemp("models") / "qwen", "qwen2", tokenizer, head_dim=None, tie_word_embeddings=True)


@pytest.mark.parametrize("outtype", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen", "demo"])
def test_a_file_read_back_is_the_model(
    family: str, outtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = BASE if family == "demo" else request.getfixturevalue(family)
    write(folder, tmp_path / "model.gguf", "--outtype", outtype)
    (model, tokenizer), (found, own) = plain(folder), read(tmp_path / "model.gguf")
    expected, weights = model.state_dict(), found.state_dict()
    assert expected.keys() == weights.keys()
    for name, weight in expected.items():
        if weight.dim() < 2:
            torch.testing.assert_close(weights[name], weight, atol=0, rtol=0)
        elif outtype == "f16":
            torch.testing.assert_close(weights[name], weight.half().float(), atol=0, rtol=0)
        else:
            assert (
                weights[name] - weight
            ).abs().max() <= weight.abs().max() / 127 * 0.57  # half a step, and the rounding of its size
            assert (weights[name] - weight).abs().max() > 0
    for text in TEXTS:
        assert own(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert own.chat_template == tokenizer.chat_template
    assert (own.eos_token, own.bos_token) == (tokenizer.eos_token, tokenizer.bos_token)


def test_what_the_file_says(llama: Path, qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for folder in (llama, qwen):
        write(folder, tmp_path / folder.name / "model.gguf") if (tmp_path / folder.name).mkdir() is None else None
    said, of_qwen = (fields(tmp_path / name / "model.gguf") for name in ("llama", "qwen"))
    assert said["general.architecture"] == "llama"
    assert said["llama.attention.head_count_kv"] == 2
    assert said["llama.rope.freq_base"] == 500.0
    assert said["tokenizer.ggml.pre"] == "llama-bpe"
    assert said["tokenizer.ggml.add_bos_token"] is False  # the template writes it
    assert of_qwen["tokenizer.ggml.pre"] == "qwen2"
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (of_qwen["tokenizer.ggml.eot_token_id"], of_qwen["tokenizer.ggml.eos_token_id"]) == (end, 0)
    kinds = of_qwen["tokenizer.ggml.token_type"]
    assert [kinds[id_] for id_ in (0, 1, 2, 3, len(tokenizer))] == [3, 3, 3, 1, 5]
    assert of_qwen["qwen2.vocab_size"] == len(of_qwen["tokenizer.ggml.tokens"]) == len(tokenizer) + 3
    assert "Modelfile" in {path.name for path in (tmp_path / "qwen").iterdir()}


def test_llama_3_frequencies_are_those_of_transformers(llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    write(llama, tmp_path / "model.gguf")
    (factors,) = (
        tensor.data for tensor in GGUFReader(tmp_path / "model.gguf").tensors if tensor.name == "rope_freqs.weight"
    )
    model, _ = plain(llama)
    plain_frequencies = 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain_frequencies / torch.tensor(factors), model.model.rotary_emb.inv_freq)
    assert len(set(factors.tolist())) > 2


def test_parts_hold_the_whole(qwen: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    write(qwen, tmp_path / "model.gguf", "--max_shard_size", "60KB")
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    assert parts[0].name == f"model-00001-of-{len(parts):05}.gguf"
    assert f"FROM ./{parts[0].name}" in (tmp_path / "Modelfile").read_text()
    names = [tensor.name for part in parts for tensor in GGUFReader(part).tensors]
    write(qwen, (tmp_path / "one").with_name("one") / "model.gguf") if (tmp_path / "one").mkdir() is None else None
    assert names == [tensor.name for tensor in GGUFReader(tmp_path / "one" / "model.gguf").tensors]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("with_scores", [True, False])
def test_sentencepiece_vocabularies(sentencepiece_file: Path, with_scores: bool, tmp_path: Path) -> None:
    """With the scores of tokenizer.model, and with those that follow from the merges of tokenizer.json."""
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_file.parent)
    tokenizer.pad_token = "</s>"
    tokenizer.chat_template = LLAMA_2
    folder = save(tmp_path / "model", "llama", tokenizer)
    if with_scores:
        shutil.copy(sentencepiece_file, folder)
    write(folder, tmp_path / "model.gguf")
    said = fields(tmp_path / "model.gguf")
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    _, own = read(tmp_path / "model.gguf")
    for text in TEXTS:
        assert own(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids


def test_lost_merges_are_found(sentencepiece_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores that would order the merges otherwise must not be written."""
    from transformers import LlamaTokenizer

    tokenizer = LlamaTokenizer.from_pretrained(sentencepiece_file.parent)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][::-1]
    tokenizer.chat_template = LLAMA_2
    tokenizer.pad_token = "</s>"
    folder = save(tmp_path / "model", "llama", tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(sentencepiece_file, folder)
    assert main(["release", "gguf", str(folder), "--output", str(tmp_path / "model.gguf")]) == 65
    assert "llama.cpp would give other ids" in capsys.readouterr().err


def test_words_cut_in_no_known_way_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_level("qwen2", ["<|end|>"])
    backend = tokenizer.backend_tokenizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[aeiou]"), "isolated"), level])
    folder = save(tmp_path / "model", "llama", tokenizer)
    assert main(["release", "gguf", str(folder), "--output", str(tmp_path / "model.gguf")]) == 65
    error = capsys.readouterr().err
    assert "no known name" in error
    assert list(tmp_path.iterdir()) == [folder]


def test_bad_input_is_named(
    llama: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(folder: Path, output: Path, code: int, *options: str) -> str:
        assert main(["release", "gguf", str(folder), "--output", str(output), *options]) == code
        return capsys.readouterr().err

    file = tmp_path / "model.gguf"
    assert "no such folder" in error_of(tmp_path / "absent", file, 74)
    assert "WordLevel" in error_of(model_folder, file, 65)
    assert "ends in .gguf" in error_of(llama, tmp_path / "model.bin", 2)
    assert "write a size" in error_of(llama, file, 2, "--max_shard_size", "many")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "is an adapter" in error_of(adapter, file, 65)
    other = shutil.copytree(llama, tmp_path / "other")
    config = json.loads((llama / "config.json").read_text())
    converter = f"python convert_hf_to_gguf.py {other} --outfile {file} --outtype f16"
    for changes, reason in (
        ({"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}, converter),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        ({"tie_word_embeddings": False, "vocab_size": 300}, "of another model"),
    ):
        (other / "config.json").write_text(json.dumps(config | changes))
        assert reason in error_of(other, file, 65)
    file.write_text("mine")
    assert "exists" in error_of(llama, file, 2)
    assert file.read_text() == "mine"


def test_a_number_beyond_float16_is_refused(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(llama, tmp_path / "large")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][3, 4] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert main(["release", "gguf", str(folder), "--output", str(tmp_path / "model.gguf")]) == 65
    assert "lm_head.weight holds 1e+05" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_weights_that_transformers_does_not_read_stay_out(llama: Path, tmp_path: Path) -> None:
    """Mistral's own layout lies beside transformers' in its folders."""
    from safetensors.torch import save_file

    folder = shutil.copytree(llama, tmp_path / "both")
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    write(folder, tmp_path / "model.gguf")


def test_a_full_disk_is_said_before_anything_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    assert main(["release", "gguf", str(llama), "--output", str(tmp_path / "model.gguf")]) == 74
    assert "free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_only_one_tensor_is_in_memory(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is written before the next one is read."""
    from gguf import GGUFWriter

    from qlora_dpo.release.gguf.model import SourceTensor

    order: list[str] = []
    own_read, own_write = SourceTensor.read, GGUFWriter.write_tensor_data
    monkeypatch.setattr(SourceTensor, "read", lambda *args: order.append("read") or own_read(*args))
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", lambda *args: order.append("write") or own_write(*args))
    write(llama, tmp_path / "model.gguf")
    assert order == ["read", "write"] * (len(order) // 2)
    assert len(order) > 20


def chat_tokenizer(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA_2, *("{{ bos_token }}" + text for text in PROMPT_TEMPLATES.values())]
)
def test_fixed_text_renders_what_the_chat_template_does(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    try:
        fixed = fixed_text(tokenizer)
    except NotConcatenated:
        assert template in (
            "{{ bos_token }}" + PROMPT_TEMPLATES["anima"],
            "{{ bos_token }}" + PROMPT_TEMPLATES["plain"],
        )
        return
    turns = [("user", "w3"), ("assistant", "w4 w5"), ("user", "w6\nw7")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert fixed.render(turns) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_modelfile_of_known_and_unknown_templates() -> None:
    text = modelfile(chat_tokenizer(CHATML), "model.gguf")
    assert text.startswith("FROM ./model.gguf\nTEMPLATE ")
    assert 'if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}' in text
    assert '{{ if ne .Role "system" }}{{ "<|im_start|>system\\nBe brief.<|im_end|>\\n" }}{{ end }}' in text
    assert 'PARAMETER stop "</s>"' in text
    odd = modelfile(chat_tokenizer("{{ messages[-1]['content'] | upper }}"), "model.gguf")
    assert 'TEMPLATE "' not in odd
    assert "# No TEMPLATE" in odd
