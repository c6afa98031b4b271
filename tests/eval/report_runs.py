"""Made-up run folders for the tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

CONFIG: dict[str, Any] = {
    "model_name_or_path": "org/base-7b",
    "reference_model": None,
    "objective": "dpo",
    "dataset": "pairs.jsonl",
    "beta": 0.1,
    "loss_type": ["sigmoid"],
    "loss_weights": [],
    "on_displacement": "warn",
    "learning_rate": 1e-5,
    "num_train_epochs": 1.0,
    "max_grad_norm": 1.0,
    "chosen_key": "chosen",
    "rejected_key": "rejected",
    "seed": 42,
}
ENVIRONMENT = {"torch": "2.13.0", "processor": "CPU", "cores": 2, "memory_gib": 24.0, "gpus": ["NVIDIA H100, 80 GiB"]}


def make_run(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    config: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
) -> Path:
    """A run with these lines in metrics.jsonl; without a status it has not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {}), allow_unicode=True))
    if status is not None:
        (folder / "run.json").write_text(json.dumps({"environment": ENVIRONMENT} | status))
    if rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(step: int, chosen: float, rejected: float, **values: Any) -> dict[str, Any]:
    """A line of metrics.jsonl whose rewards are these."""
    margin = chosen - rejected
    return {
        "step": step,
        "loss": math.log1p(math.exp(-margin)),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": float(margin > 0),
        "rewards/margins": margin,
        "logps/chosen": -100 + 10 * chosen,
        "logps/rejected": -120 + 10 * rejected,
        "displacement/chosen_per_token": chosen / 5,
        "grad_norm": 0.5,
        "learning_rate": 1e-5,
        "step_seconds": 2.0,
        "pairs_per_second": 8.0,
        "tokens_per_second": 8000.0,
        "memory/peak_gib": 31.5,
        "epoch": step / 100,
    } | values


def long_run(steps: int, seed: int = 0, categories: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """A noisy run whose chosen answers fall a little."""
    chance = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-3 * step / steps)
        chosen, rejected = (end * progress + chance.gauss(0, 0.12) * progress for end in (-0.35, -1.6))
        values: dict[str, Any] = {
            "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.4 * progress + chance.gauss(0, 0.06))),
            "displacement/chosen_per_token": chosen / 5,
            "grad_norm": math.exp(chance.gauss(-0.6, 0.35)),
            "learning_rate": 1e-5 * min(1, 10 * step / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps)),
            "step_seconds": 2 + chance.gauss(0, 0.1),
            "tokens_per_second": 8000 + chance.gauss(0, 400),
            "memory/peak_gib": 31.5 + 4 * progress,
        }
        for place, name in enumerate(categories):
            lag = progress * (1 - 0.12 * place)
            values |= _category("", name, lag, chance)
        if step % max(1, steps // 12) == 0 or step == steps:
            values |= {
                f"eval_{key}": value
                for key, value in row(step, -0.33 * progress, -1.5 * progress).items()
                if key != "step"
            }
            values["eval_rewards/accuracies"] = 0.5 + 0.37 * progress
            for place, name in enumerate(categories):
                values |= _category("eval_", name, progress * (1 - 0.12 * place), chance)
        rows.append(row(step, chosen, rejected) | values)
    return rows


def _category(prefix: str, name: str, progress: float, chance: random.Random) -> dict[str, float]:
    margin = 1.3 * progress + chance.gauss(0, 0.05)
    return {
        f"{prefix}loss/{name}": math.log1p(math.exp(-margin)),
        f"{prefix}rewards/accuracies/{name}": 0.5 + 0.4 * progress,
        f"{prefix}rewards/margins/{name}": margin,
        f"{prefix}count/{name}": 40,
    }


def answer(text: str, reward: float = 0.2) -> dict[str, Any]:
    """An answer of a comparison."""
    return {
        "text": text, "tokens": len(text.split()) + 1, "finish_reason": "stop", "logp": -12.5, "logp_per_token": -0.8,
        "logp_policy": -12.5, "logp_reference": -14.5, "reward": reward, "seconds": 0.1,
    }  # fmt: skip


def add_comparison(folder: Path, prompts: list[tuple[str, str, str, str]]) -> None:
    """A finished comparison of (category, prompt, before, after)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = [{"settings": {"temperature": 0.0, "seed": 42}}]
    verdicts = []
    for number, (category, prompt, before, after) in enumerate(prompts):
        identity = f"{number:016x}"
        lines.append(
            {
                "id": identity, "prompt": prompt, "category": category, "reference_answer": after,
                "origin": f"p:{number}", "seed": 1, "before": answer(before, -0.1), "after": answer(after, 0.4),
            }
        )  # fmt: skip
        winner = ("after", "after", "tie", "before")[number % 4]
        verdicts.append({"id": identity, "method": "rule:chrf", "winner": winner, "scores": [0.3, 0.6], "detail": {}})
    (folder / "answers.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in verdicts))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))


SUMMARY: dict[str, Any] = {
    "settings": {"temperature": 0.0},
    "prompts": 300,
    "verdicts": {
        "rule:chrf": {
            "win": 171, "tie": 60, "loss": 69, "win_rate": 0.67, "interval": [0.614, 0.721],
            "score_difference": {"mean": 0.113, "interval": [0.081, 0.146]}, "length_controlled_win_rate": 0.612,
            "length_controlled_interval": [0.553, 0.668],
            "by_category": {
                "open_qa": {"win": 90, "tie": 20, "loss": 40, "win_rate": 0.667, "interval": [0.588, 0.737]},
                "summarization": {"win": 30, "tie": 25, "loss": 35, "win_rate": 0.472, "interval": [0.372, 0.575]},
            },
        },
        "judge": {
            "win": 140, "tie": 92, "loss": 68, "win_rate": 0.62, "interval": [0.564, 0.673], "score_difference": None,
            "length_controlled_win_rate": 0.588, "by_category": {},
        },
    },
    "rates": {
        "before": {"refusal": 0.04, "repetition": 0.01, "missing_end": 0.02, "empty": 0.0, "mean_tokens": 41.2},
        "after": {"refusal": 0.013, "repetition": 0.017, "missing_end": 0.03, "empty": 0.0, "mean_tokens": 77.9},
    },
    "facts": {
        "prompts": 100, "before": 0.9, "after": 0.88, "right_before": 90, "still_right": 88, "kept": 0.978,
        "kept_interval": [0.923, 0.994],
    },
    "rewards": {"before": -0.12, "after": 0.84},
    "held_out": {"reward_accuracy": 0.87, "margin": 1.19},
    "kl": {"mean": 8.42, "interval": [7.1, 9.8], "per_token": 0.11},
    "seconds": 47.9,
}  # fmt: skip
