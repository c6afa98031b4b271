"""Metrics by category: they add up to the overall ones, whatever the cut, and a run without categories has none."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IdPair, random_pairs, tiny_model, with_lora
from training.runs import make_training

from qlora_dpo.objectives.categories import Categories, CategorySums, make_categories
from qlora_dpo.training.by_category import category_table
from qlora_dpo.training.loop import fit
from qlora_dpo.training.records.curves import draw_curves
from qlora_dpo.training.records.model_card import write_model_card
from qlora_dpo.training.records.tracking import read_metrics

SHOWN = ("loss", "rewards/accuracies", "rewards/margins")
NAMES = ["math", "open qa", None, "数学", "math", "open qa", "math", "code"]


def pairs(count: int = 24) -> list[IdPair]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 14, (count, 3), generator=generator).tolist()
    made = random_pairs([tuple(row) for row in lengths])
    return [replace(pair, category=NAMES[place % len(NAMES)]) for place, pair in enumerate(made)]


def categories_of(made: Sequence[IdPair]) -> Categories | None:
    return make_categories([pair.category for pair in made], range(len(made)))


def trained(folder: Path, categories: Categories | None, steps: int = 4, **options: Any) -> list[dict[str, Any]]:
    """The metrics of a short run on pairs of five categories, or of none."""
    training = make_training(
        with_lora(tiny_model(), zero=True), pairs(), folder, steps=steps, pairs_per_step=8, **options
    )
    training.engine.categories = categories
    training.eval_indices = range(12)
    fit(training)
    return read_metrics(training.run.metrics)


# Names


def test_names_are_those_of_the_data_made_safe_and_different() -> None:
    found = ["a b", "a/b", "数学", "other", "none", None, "", "a b", "x" * 100]
    categories = make_categories(found, range(len(found)))
    assert categories is not None and categories.names[0] == "other"
    named = [categories.names[number] for number in categories.of]
    assert named == ["a_b", "a_b_2", "数学", "other_2", "none", "none_2", "_", "a_b", "x" * 64]


def test_twenty_categories_have_names_and_the_rest_is_other() -> None:
    found = [f"c{number}" for number in range(30) for _ in range(30 - number)]
    categories = make_categories(found, range(len(found)))
    assert categories is not None
    named = Counter(categories.names[number] for number in categories.of)
    assert len(named) == 21 and named["other"] == sum(range(1, 11)) and named["c0"] == 30 and "c20" not in named


@pytest.mark.parametrize("found", [[], [None, None], ["math"] * 3])
def test_one_category_or_none_is_no_matter(found: list[str | None]) -> None:
    assert make_categories(found, range(len(found))) is None


def test_only_pairs_that_are_used_count() -> None:
    assert make_categories(["math", "chat", "math"], [0, 2]) is None


# Numbers


@pytest.mark.parametrize("max_tokens", [10_000, 30])
def test_categories_weighted_by_count_are_the_overall_metrics(max_tokens: int, tmp_path: Path) -> None:
    rows = trained(tmp_path, categories_of(pairs()), max_tokens=max_tokens)
    assert len(rows) == 4
    for row in rows:
        for prefix, size in (("", 8), ("eval_", 12)):
            counts = {key.removeprefix(f"{prefix}count/"): row[key] for key in row if key.startswith(f"{prefix}count/")}
            if prefix and not counts:
                continue  # only the last step evaluates
            assert sum(counts.values()) == size and len(counts) > 1
            for name in SHOWN:
                total = sum(row[f"{prefix}{name}/{category}"] * count for category, count in counts.items())
                assert total / size == pytest.approx(row[f"{prefix}{name}"], abs=1e-6)
    assert {"eval_loss/math", "eval_rewards/margins/none", "eval_count/open_qa"} <= rows[-1].keys()


def test_each_category_is_the_mean_over_its_own_pairs(tmp_path: Path) -> None:
    made = pairs()
    training = make_training(with_lora(tiny_model()), made, tmp_path, steps=1)
    training.engine.categories = categories_of(made)
    whole = training.engine.evaluate(range(24), lambda: None)
    for category, name in (("math", "math"), (None, "none")):
        members = [place for place, pair in enumerate(made) if pair.category == category]
        alone = training.engine.evaluate(members, lambda: None)
        assert whole[f"count/{name}"] == len(members)
        for key in SHOWN:
            assert whole[f"{key}/{name}"] == pytest.approx(alone[key], abs=1e-6)


def test_cut_does_not_change_the_numbers(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", categories_of(pairs()))
    cut = trained(tmp_path / "cut", categories_of(pairs()), max_tokens=30)
    for ours, expected in zip(cut, whole, strict=True):
        assert ours.keys() == expected.keys()
        for key in (key for key in expected if key.rpartition("/")[0] in {*SHOWN, *(f"eval_{name}" for name in SHOWN)}):
            assert ours[key] == pytest.approx(expected[key], abs=1e-5)


def test_what_is_not_finite_stays_in_its_category() -> None:
    sums = CategorySums(Categories(("other", "a", "b"), [1, 2, 1]))
    sums.add({"loss": torch.tensor([1.0, math.nan]), "rewards/accuracies": torch.tensor([True, False])}, [0, 1])
    sums.add({"loss": torch.tensor([2.0]), "rewards/accuracies": torch.tensor([False])}, [2])
    mean = sums.mean()
    assert mean.pop("loss/b") != mean.get("loss/b", math.nan)
    assert mean == {"loss/a": 1.5, "rewards/accuracies/a": 0.5, "rewards/accuracies/b": 0, "count/a": 2, "count/b": 1}


def test_run_without_categories_logs_what_it_always_did(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", None)
    measured = [
        "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
        "logps/rejected", "displacement/chosen_per_token", "displacement/rejected_per_token", "lengths/chosen",
        "lengths/rejected",
    ]  # fmt: skip
    of_step = [
        "grad_norm", "learning_rate", "displacement/smoothed", "step_seconds", "pairs_per_second", "tokens_per_second",
        "memory/peak_gib", "epoch",
    ]  # fmt: skip
    assert list(plain[0]) == ["step", *measured, *of_step]
    assert list(plain[-1]) == [*plain[0], *(f"eval_{name}" for name in measured)]
    by_category = trained(tmp_path / "by_category", categories_of(pairs()))
    assert [row["loss"] for row in by_category] == [row["loss"] for row in plain]


# Curves and card


def height(png: Path) -> int:
    return int.from_bytes(png.read_bytes()[20:24], "big")


def test_curves_have_one_panel_more_where_there_are_categories(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 0.5, "rewards/accuracies": 0.5} for step in (1, 2)]
    named = [row | {f"{name}/数学": 0.5 for name in ("loss", "count")} for row in rows]
    evaluated = [row | {f"eval_{name}/c{n}": 0.5 for name in ("loss", "count") for n in range(21)} for row in named]
    for name, content in (("plain", rows), ("by_category", named), ("evaluated", evaluated)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
        draw_curves(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
    assert height(tmp_path / "by_category.png") == height(tmp_path / "evaluated.png")
    assert height(tmp_path / "by_category.png") == pytest.approx(1.5 * height(tmp_path / "plain.png"), abs=2)


def test_card_has_a_table_where_there_are_categories(tmp_path: Path) -> None:
    def card(last: dict[str, Any]) -> str:
        write_model_card(
            tmp_path / "README.md", name="run", version="1", base="base", dataset="mix.yaml", quantization=None,
            options=dict.fromkeys(
                ("loss_type", "beta", "learning_rate", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "lora_r",
                 "lora_alpha", "lora_dropout", "max_length", "max_prompt_length", "seed")
            ),
            data_summary=[], metrics=[last],
        )  # fmt: skip
        return (tmp_path / "README.md").read_text()

    plain = {"step": 4, "loss": 0.5, "eval_loss": 0.6}
    assert "category" not in card(plain)
    named = {"eval_loss/math": 0.25, "eval_rewards/accuracies/math": 1.0, "eval_rewards/margins/math": 0.125}
    other = {"eval_loss/open_qa": 0.75, "eval_rewards/accuracies/open_qa": 0.5, "eval_rewards/margins/open_qa": -0.5}
    text = card(plain | named | other | {"eval_count/math": 1200, "eval_count/open_qa": 2, "count/math": 4})
    table = [
        "| category | held-out pairs | loss | reward accuracy | reward margin |",
        "|---|---:|---:|---:|---:|",
        "| math | 1,200 | 0.25 | 1 | 0.125 |",
        "| open_qa | 2 | 0.75 | 0.5 | -0.5 |",
    ]
    assert "\n\n" + "\n".join(table) + "\n\n" in text
    assert category_table({"loss/a": 0.5, "count/a": 3}) == []  # a few pairs of one step
