"""Files from others run no code, and secrets are written nowhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, with_lora

from qlora_dpo.cli import main
from qlora_dpo.errors import ModelError, QloraDpoError, StorageError, UsageError
from qlora_dpo.models.loading import load_base, load_config, load_tokenizer, model_on_meta
from qlora_dpo.models.lora import check_adapter_folder, load_adapter, save_adapter
from qlora_dpo.redaction import redacted, refuse_secrets
from qlora_dpo.training.folder.checkpoints import load_state

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("qlora_dpo", "eval") for path in sorted((ROOT / folder).rglob("*.py"))]
CPU = torch.device("cpu")
USAGE, DATA = 2, 65


# No pickles, no code from elsewhere


def calls(tree: ast.AST) -> list[tuple[str, dict[str, Any]]]:
    """(dotted name, keyword arguments that are constants) of every call."""
    return [
        (ast.unparse(node.func), {
            word.arg: word.value.value for word in node.keywords if word.arg and isinstance(word.value, ast.Constant)
        })
        for node in ast.walk(tree) if isinstance(node, ast.Call)
    ]  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_load_no_pickle_and_run_no_text(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert not imported & {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
    for name, words in calls(tree):
        assert name not in {"eval", "exec", "os.system", "yaml.load", "yaml.unsafe_load", "AutoPeftModel"}, name
        assert name != "torch.load" or words.get("weights_only") is True
        assert name != "AutoModelForCausalLM.from_pretrained" or words.get("use_safetensors") is True
        assert not words.get("allow_pickle") and not words.get("shell") and not words.get("trust_remote_code"), name


class RunsCode:
    """A pickle of this writes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def test_checkpoint_with_a_planted_pickle_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state": RunsCode(tmp_path / "ran")}, tmp_path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "optimizer.pt", weights_only=False)  # the trap works
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_model_folder_with_pickled_weights_only_is_refused(name: str, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(StorageError, match=rf"no \*\.safetensors weights \({name} is a pickle"):
        load_base(str(folder), device=CPU)
    assert not (tmp_path / "ran").exists()


def adapter(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_adapter(with_lora(tiny_model()), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_pickle_beside_an_adapter_is_not_read_and_alone_it_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    load_adapter(tiny_model(), folder, trainable=False)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"adapter_model\.bin is not read"):
        load_adapter(tiny_model(), folder, trainable=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "field",
    [
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"auto_mapping": {"base_model_class": "system", "parent_library": "transformers.models.llama os"}},
        {"auto_mapping": {"base_model_class": "system", "parent_library": "transformers.utils"}},
        {"megatron_config": {"tensor_model_parallel_size": 1}},
        {"base_model_class": "system", "parent_library": "os"},
        {"megatron_core": "os"},
        {"corda_config": {"cache_file": "/tmp/cache.pt"}},
        {"lora_ga_config": {"cache_file": "/tmp/cache.pt"}},
        {"eva_config": {"rho": 2.0}},
        {"arrow_config": {"top_k": 1}},
        {"loftq_config": {"loftq_bits": 4}},
        {"runtime_config": {"ephemeral_gpu_offload": True}},
        {"layer_replication": [[0, 2], [0, 2]]},
        {"custom_modules": {"torch.nn.Linear": "evil.Linear"}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"peft_type": "SHADOW"},
    ],
    ids=lambda field: "+".join(field),
)
def test_adapter_config_that_asks_for_more_than_lora_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=next(iter(field))):
        check_adapter_folder(adapter(tmp_path / "adapter", **field))


def test_adapter_configs_that_peft_writes_are_read(tmp_path: Path) -> None:
    plain = adapter(tmp_path / "plain")
    assert check_adapter_folder(plain)["r"] == 4
    assert check_adapter_folder(adapter(plain, use_rslora=True, rank_pattern={"q_proj": 2}, qalora_group_size=16))
    (plain / "adapter_config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds no JSON object"):
        check_adapter_folder(plain)


def test_adapter_hidden_in_a_model_folder_is_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    adapter(tmp_path / "model")
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config\.json\) beside the model"):
        load_base(str(tmp_path / "model"), device=CPU)


@pytest.mark.parametrize("repository", ["", "other/repository--"])
def test_remote_code_always_comes_from_the_pinned_commit(
    repository: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config, tokenizer, weights and the model without weights: wherever the code lives, the commit is asked for."""
    commit, asked = "0123456789" * 4, []

    def remember(repository: str, module: str, *, revision: str | None = None, **_others: Any) -> str:
        asked.append(revision)
        raise OSError("stop here")

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    monkeypatch.setattr("transformers.dynamic_module_utils.get_cached_module_file", remember)

    def name_code(file: str, **classes: Any) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {"auto_map": classes}))

    def fails(call: Any) -> None:
        asked.clear()
        with pytest.raises((QloraDpoError, OSError)):
            call()
        assert asked and set(asked) == {commit}

    name_code("config.json", AutoModelForCausalLM=f"{repository}modeling.Model")
    config = load_config(str(folder), commit, trust_remote_code=True)
    config._commit_hash = commit
    fails(lambda: load_base(str(folder), device=CPU, revision=commit, trust_remote_code=True))
    fails(lambda: model_on_meta(config, trust_remote_code=True))
    name_code("tokenizer_config.json", AutoTokenizer=[None, f"{repository}tokens.Tokenizer"])
    fails(lambda: load_tokenizer(str(folder), commit, trust_remote_code=True))
    name_code("config.json", AutoConfig=f"{repository}configuration.Config")
    fails(lambda: load_config(str(folder), commit, trust_remote_code=True))


# Secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:s3cret@host/pairs.jsonl", "https://***@host/pairs.jsonl"),
        ("https://s3cret@host", "https://***@host"),
        ("https://host/p?X-Amz-Signature=abc&x=1", "https://host/p?X-Amz-Signature=***&x=1"),
        ("Authorization: Bearer abcdefgh12", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrst", "***"),
        ("key sk-proj-abcdefghijklmnop_1", "key ***"),
        ("the value my-own-secret-9", "the value ***"),
        ("org/sk-small runs/hf_model user@host a:b https://host/a@b", None),
        ("/etc/ssl/key.pem ordinary-value shorty", None),
    ],
)
def test_keys_and_passwords_are_recognized(text: str, shown: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SECRET", "my-own-secret-9")
    monkeypatch.setenv("SSL_KEY", "/etc/ssl/key.pem")
    monkeypatch.setenv("PIN_SECRET", "short")
    monkeypatch.setenv("MY_SETTING", "ordinary-value")
    assert redacted(text) == (text if shown is None else shown)
    if shown is not None:
        with pytest.raises(UsageError, match="--dataset holds a secret"):
            refuse_secrets({"beta": 0.1, "dataset": text})


@pytest.mark.parametrize("way", ["command line", "YAML", "YAML from the environment", "wrong type"])
def test_secret_in_an_option_is_refused_unseen_and_unwritten(
    way: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_SECRET", "canary-7f3a9")
    arguments = ["train", "--model_name_or_path", str(model_folder), "--dataset", "pairs.jsonl"]
    texts = {"YAML": "run_name: canary-7f3a9\n", "YAML from the environment": "run_name: ${oc.env:MY_SECRET}\n"}
    if way in texts:
        (tmp_path / "recipe.yaml").write_text(texts[way])
        arguments += ["--config", str(tmp_path / "recipe.yaml")]
    elif way == "command line":
        arguments += ["--eval_dataset", "https://me:canary-7f3a9@host/pairs.jsonl"]
    else:
        arguments += ["--beta", "canary-7f3a9"]
    assert main(arguments) == USAGE
    shown = capsys.readouterr()
    assert "canary" not in shown.out + shown.err and "***" in shown.err and "Traceback" not in shown.err
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml"}


def test_env_command_shows_no_secret(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "MY_SECRET", "MY_SETTING"):
        monkeypatch.setenv(name, "canary-7f3a9")
    assert main(["env"]) == 0
    assert "canary" not in capsys.readouterr().out


CANARIES = {
    "HF_TOKEN": "hf_canaryAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
    "WANDB_API_KEY": "canarybb" * 5,
    "OPENAI_API_KEY": "sk-canaryCCCCCCCCCCCCCCCCCCCC",
    "MY_SECRET": "canaryDDDD-1",
}
TRAIN = """
import sys
from qlora_dpo.cli import main
arguments, sys.argv = sys.argv[1:], ["train", "--dataset", "https://me:canaryEEEE@host/pairs.jsonl"]
sys.exit(main(arguments))
"""


@pytest.mark.slow
def test_secrets_of_the_process_are_in_no_file_and_no_output(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """A run with both trackers, with keys in its environment and a password in the command line that trackers see."""
    home = tmp_path / "home"
    home.mkdir()
    arguments = {
        "--model_name_or_path": model_folder, "--dataset": pairs_file, "--output_dir": tmp_path / "run",
        "--max_steps": 4, "--gradient_accumulation_steps": 4, "--save_steps": 2, "--dtype": "float32",
        "--report_to": "wandb,tensorboard",
    }  # fmt: skip
    environment = os.environ | CANARIES | {
        "HOME": str(home), "TMPDIR": str(home), "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT),
        "QLORA_DPO_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, "train", *(str(part) for pair in arguments.items() for part in pair)],
        env=environment, cwd=tmp_path, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b"no longer told" not in done.stderr
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.suffix for path in files}
    assert {".wandb", ".jsonl", ".yaml", ".safetensors", ".pt"} <= names and any("tfevents" in str(p) for p in files)
    assert b"rewards/margins" in b"".join(content for path, content in files.items() if path.suffix == ".wandb")
    found = [str(path) for path, content in files.items() if b"canary" in content]
    assert not found and b"canary" not in done.stdout + done.stderr
