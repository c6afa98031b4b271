"""Folders to be released, made without training: a finished run with its records, a merged folder, GGUF files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from tiny import tiny_model, tiny_tokenizer, with_lora

from qlora_dpo.config.training import TrainConfig
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.training.folder.content import weights_fingerprint

VERDICT = {
    "prompts": 20, "win": 14, "tie": 2, "loss": 4, "win_rate": 0.75, "interval": [0.53, 0.89],
    "length_controlled_win_rate": None, "length_controlled_interval": None, "by_category": {},
}  # fmt: skip
CANDIDATE = {"kl_mean": 0.001, "kl_p99": 0.01, "kl_of_scale": 0.02, "margin_retained": 0.99, "reward_accuracy": 0.9}


def make_run(folder: Path, base: str = "org/base", **config: Any) -> Path:
    """A finished run, as `train` leaves it, with the files that must not leave."""
    (folder / "checkpoint-40").mkdir(parents=True)
    (folder / "pairs").mkdir()
    save_adapter(with_lora(tiny_model()), folder)
    change(folder / "adapter_config.json", base_model_name_or_path=base, revision="c" * 40)
    tiny_tokenizer().save_pretrained(folder)
    for name in ("optimizer.pt", "rng_state.pt"):
        (folder / "checkpoint-40" / name).write_bytes(b"PK\3\4 state")
    (folder / "pairs" / "train.jsonl").write_text('{"prompt": "private row"}\n')
    (folder / "training_curves.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    settings = TrainConfig().flat() | {"model_name_or_path": base, "dataset": "org/pairs", "output_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config))
    dump(folder / "run.json", {"status": "finished", "step": 60, "total_steps": 60})
    row = {"step": 60, "loss": 0.5, "eval_rewards/accuracies": 0.875, "eval_rewards/margins": 1.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    dataset = config.get("dataset", "org/pairs")
    dump(folder / "data.json", {
        "summary": [f"{dataset}: 40 pairs from 41 rows (plaintext)"], "sources": [{"source": dataset}],
        "lint": {"rules": {"length_bias": {"count": 1}}},
    })  # fmt: skip
    return folder


def add_comparison(run: Path, holds: bool = True, **texts: str) -> None:
    """A comparison of this adapter, and its gate."""
    folder = run / "compare"
    folder.mkdir()
    prompts = {"source": str(run / "pairs/held.jsonl")}
    summary = {
        "settings": {"adapter_fingerprint": weights_fingerprint(run), "prompts": prompts},
        "prompts": 20, "verdicts": {"rule:chrf": VERDICT},
        "rates": {"before": {"refusal": 0.25}, "after": {"refusal": 0.125}},
        "kl": {"mean": 2.5, "per_token": 0.25},
    }  # fmt: skip
    dump(folder / "summary.json", summary)
    row = {"prompt": "p", "before": {"text": "b"}, "after": {"text": "a"}} | {
        name: text if name == "prompt" else {"text": text} for name, text in texts.items()
    }
    (folder / "answers.jsonl").write_text('{"settings": {}}\n' + (json.dumps(row) + "\n") * 20)
    outcome = {"metric": "kl.mean", "comparison": "below", "value": 2.5, "limit": 3.0 if holds else 2.0, "holds": holds}
    digest = hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest()
    dump(folder / "gate.json", {"holds": holds, "summary": digest, "outcomes": [outcome]})


def make_merged(folder: Path, run: Path | None = None, problems: tuple[str, ...] = ()) -> Path:
    """A merged folder in two shards, with its report."""
    model = tiny_model()
    model.save_pretrained(folder, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(folder)
    candidates = [
        {"name": "train, bfloat16", **CANDIDATE, "problems": list(problems)},
        {
            "name": "original, bfloat16",
            **CANDIDATE,
            "margin_retained": 0.5,
            "problems": ["it keeps 50 % of the margin"],
        },
    ]
    dump(folder / "merge_report.json", {
        "run": str(run) if run else None, "adapter": str(run) if run else None, "chosen": "train, bfloat16",
        "candidates": candidates, "yardstick": {"scale_kl_mean": 0.05, "noise_kl_mean": 1e-6},
    })  # fmt: skip
    return folder


def make_gguf(folder: Path) -> Path:
    """A folder with what is called GGUF."""
    folder.mkdir(parents=True)
    (folder / "model-q8_0.gguf").write_bytes(b"GGUF" + bytes(64))
    (folder / "Modelfile").write_text("FROM ./model-q8_0.gguf\n")
    return folder


def change(file: Path, **values: Any) -> None:
    """Change values of a JSON object."""
    dump(file, json.loads(file.read_text()) | values)


def dump(file: Path, content: Any) -> None:
    """Write JSON."""
    file.write_text(json.dumps(content))
