"""Laws 8 and 9: the merged model is the trained one, and what is written loads in plain PEFT and transformers."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch
from merged_in_memory import merged_weights
from release.tiny_adapters import save_adapter, save_base, save_run
from safetensors.torch import load_file, save_file
from tiny import RAGGED, random_pairs

from qlora_dpo.cli import main
from qlora_dpo.release.merging.merge import recipes_of
from qlora_dpo.release.merging.weights import Merge
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.trained_on import load_trained

ROOT = Path(__file__).resolve().parents[2]
UNMEASURED = ("--measure", "false", "--base", "train", "--dtype", "float32")


@pytest.fixture(scope="module", params=["4bit", "8bit", "none"])
def finished_run(request: pytest.FixtureRequest, model_folder: Path, pairs_file: Path, tmp_path_factory: Any) -> Path:
    """A run long enough that the adapter matters."""
    return trained(tmp_path_factory.mktemp("runs") / str(request.param), model_folder, pairs_file, str(request.param))


def trained(out: Path, base: Path, pairs: Path, held: str) -> Path:
    quantization = {"4bit": [], "8bit": ["--load_in_8bit"], "none": ["--load_in_4bit", "false"]}[held]
    arguments = [
        "--model_name_or_path", base, "--dataset", pairs, "--output_dir", out, "--dtype", "float32",
        "--max_steps", "6", "--learning_rate", "0.02", "--gradient_accumulation_steps", "4", "--lora_r", "4",
        *quantization,
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    return out


@pytest.fixture
def run(model_folder: Path, pairs_file: Path, tmp_path: Path) -> Path:
    """A run with a base of its own, to be damaged."""
    return save_run(tmp_path / "run", shutil.copytree(model_folder, tmp_path / "base"), pairs_file)


def merge(adapter: Path, output: Path, *options: str) -> int:
    return main(["merge", "--adapter", str(adapter), "--output", str(output), *options])


def logps(model: Any) -> torch.Tensor:
    """Log-probs of made completions, by plain transformers."""
    rows = [[*pair.prompt_ids, *pair.chosen_ids] for pair in random_pairs(RAGGED)]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]
    return torch.cat([
        scores[:-1].log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        for scores, row in zip(logits, rows, strict=True)
    ])  # fmt: skip


def plain_peft(run: Path) -> Any:
    """The run's adapter on its base, as any PEFT program would load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = __import__("yaml").safe_load((run / "config.yaml").read_text())
    config = json.loads((run / "adapter_config.json").read_text())
    quantization = None
    if options["load_in_8bit"]:
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif options["load_in_4bit"]:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"], quantization_config=quantization, dtype=torch.float32, device_map={"": "cpu"}
    )
    # This test compares numbers only; gradients are not needed, but the repacked CPU form would round differently.
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, str(run)).eval()


@pytest.mark.slow
def test_adapter_in_plain_peft_and_merged_folder_in_plain_transformers_agree(
    finished_run: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert merge(finished_run, tmp_path / "merged", *UNMEASURED) == 0
    adapter = plain_peft(finished_run)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    before, after = logps(adapter), logps(plain)
    # int8 products round the activations too, so only weights are reproduced there
    tolerance = 0.1 if "8bit" in finished_run.name else 1e-4
    assert (before - after).abs().max() < tolerance
    with adapter.disable_adapter():
        assert (logps(adapter) - after).abs().max() > 0.3  # the adapter changed something, so agreeing means something
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (tmp_path / "merged", finished_run)]
    assert templates[0] == templates[1]


@pytest.mark.slow
def test_train_base_is_base_as_trained_plus_update_tensor_for_tensor(finished_run: Path, tmp_path: Path) -> None:
    assert merge(finished_run, tmp_path / "merged", *UNMEASURED) == 0
    expected = merged_weights(load_trained(finished_run, use_cpu=True)[0])
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []


@pytest.mark.slow
def test_original_base_is_stored_base_plus_update(finished_run: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert merge(finished_run, tmp_path / "merged", "--measure", "false", "--base", "original", *UNMEASURED[4:]) == 0
    base = json.loads((finished_run / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(finished_run)
    )
    expected = model.merge_and_unload().state_dict()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []


@pytest.mark.slow
def test_best_of_the_measured_candidates_stays_with_its_numbers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(run, tmp_path / "merged") == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report == json.loads((run / "merge_report.json").read_text())
    names = [candidate["name"] for candidate in report["candidates"]]
    assert names == ["train, bfloat16", "original, bfloat16", "train, float16", "original, float16"]
    kl = {candidate["name"]: candidate["kl_mean"] for candidate in report["candidates"]}
    assert kl["original, bfloat16"] > 5 * kl["train, bfloat16"] > 0
    assert report["chosen"] == "train, bfloat16" and not report["forced"] and len(report["layers"]) == 14
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and f"{tmp_path / 'merged'} (train, bfloat16)" in printed
    expected = merged_weights(load_trained(run, use_cpu=True)[0])
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(stored[name], weight.bfloat16()) for name, weight in expected.items())
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "train, bfloat16" in (tmp_path / "merged" / "README.md").read_text()
    assert not [path.name for path in (tmp_path / "merged").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_merge_that_loses_the_adapter_is_refused_unless_forced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault is put in: what is written is the base alone."""
    monkeypatch.setattr(
        "qlora_dpo.release.merging.adapter_updates.AdapterUpdates.merged", lambda self, name, base: base
    )
    assert merge(run, tmp_path / "merged", "--base", "train", "--dtype", "float32") == 65
    said = capsys.readouterr().err
    assert "nothing was written" in said and "train, float32: " in said and "--force" in said
    assert not (tmp_path / "merged").exists()
    assert merge(run, tmp_path / "merged", "--base", "train", "--dtype", "float32", "--force") == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["forced"] and report["candidates"][0]["problems"]


def test_unfinished_run_and_folder_in_use_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert merge(run, tmp_path / "taken") == 2
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    RunFolder(run).update_status(status="training")
    assert merge(run, tmp_path / "out", *UNMEASURED) == 2
    assert "--allow_unfinished" in capsys.readouterr().err
    assert merge(run, tmp_path / "out", *UNMEASURED, "--allow_unfinished") == 0


def test_nothing_is_chosen_unmeasured(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge(run, tmp_path / "out", "--measure", "false", "--base", "train") == 2
    assert "--measure false leaves nothing to choose by" in capsys.readouterr().err
    assert merge(run, tmp_path / "out", *UNMEASURED, "--max_shard_size", "much") == 2
    assert "--max_shard_size much" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_base_that_has_moved_is_named_and_one_that_has_changed_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    assert merge(run, tmp_path / "out", *UNMEASURED) == 74
    assert f"{tmp_path / 'base'}" in capsys.readouterr().err
    assert merge(run, tmp_path / "out", *UNMEASURED, "--base_model", str(moved)) == 0
    tensors = load_file(moved / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, moved / "model.safetensors")
    assert merge(run, tmp_path / "out2", *UNMEASURED, "--base_model", str(moved)) == 65
    said = capsys.readouterr().err
    noted = RunFolder(run).status()["content"]["model_name_or_path"]
    assert f"{moved} is not the base that {run} was trained on" in said and f"the run noted {noted[:12]}" in said
    assert not (tmp_path / "out2").exists()


def test_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapter(tmp_path / "adapter", save_base(tmp_path / "base"), target_modules=["q_proj"])
    for changes in ({"num_hidden_layers": 1}, {"hidden_size": 128}):
        other = save_base(tmp_path / f"other{len(list(tmp_path.iterdir()))}", **changes)
        assert merge(tmp_path / "adapter", tmp_path / "out", *UNMEASURED, "--base_model", str(other)) == 65
        assert "the adapter does not fit this base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_disk_that_is_too_small_is_found_before(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    assert merge(run, tmp_path / "out") == 74
    assert "two candidates at a time, takes 128." in capsys.readouterr().err and not list(tmp_path.glob(".out*"))


def test_disk_that_fills_up_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert merge(run, tmp_path / "out", *UNMEASURED) == 74
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "out cannot be written: File too large. Nothing was left there." in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def save_slowly() -> None:
    """Write the first file, say so, and hang."""
    from qlora_dpo.release.merging import weights

    def slowly(*args: Any, **keywords: Any) -> None:
        save_file(*args, **keywords)
        print("half", flush=True)
        time.sleep(60)

    weights.save_file = slowly  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_stopped_command_leaves_no_half_folder_and_the_next_works(
    how: signal.Signals, run: Path, tmp_path: Path
) -> None:
    words = ["--adapter", str(run), "--output", str(tmp_path / "out"), *UNMEASURED]
    log = tmp_path / "log"
    process = forks.Command(["merge", *words], log, before=save_slowly)
    while not log.exists() or "half" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.02)
    assert list(tmp_path.glob(".out.staging/*.safetensors")) and not (tmp_path / "out").exists()
    process.send_signal(how)
    process.wait(20)
    assert not (tmp_path / "out").exists()
    assert bool(list(tmp_path.glob(".out*"))) == (how == signal.SIGKILL)
    assert main(["merge", *words]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file() and not list(tmp_path.glob(".out*"))


def test_candidates_are_the_bases_and_types_that_there_are() -> None:
    def names(base: str, dtype: str, **facts: Any) -> list[str]:
        known: dict[str, Any] = {"comes_quantized": False, "is_held_as_stored": False, "lost_parts": []}
        known |= {"half_types": (torch.bfloat16,)}
        base_weights: Any = SimpleNamespace(check_holdable=lambda: None, **known | facts)
        nothing: Any = None
        prepared = Merge(nothing, base_weights, nothing, (), False)
        return [recipe.name for recipe in recipes_of(prepared, base, dtype)]

    assert names("auto", "bfloat16") == ["train, bfloat16", "original, bfloat16"]
    assert names("train", "auto", half_types=(torch.float16, torch.bfloat16)) == ["train, float16", "train, bfloat16"]
    assert names("auto", "float32", comes_quantized=True) == ["train, float32"]
    assert names("auto", "float32", is_held_as_stored=True) == ["train, float32"]
    assert names("auto", "float32", lost_parts=["experts"]) == ["original, float32"]


@pytest.mark.slow
def test_run_folder_holds_what_a_reader_needs(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert {
        "config.yaml", "run.json", "metrics.jsonl", "training_curves.png", "README.md", "adapter_model.safetensors",
        "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "checkpoint-6",
    } <= names  # fmt: skip
    assert (finished_run / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert RunFolder(finished_run).status()["environment"]["torch"] == torch.__version__
