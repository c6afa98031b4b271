"""Training on a mixture: what is held out, what an epoch takes, and that a continued run draws the same again."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny import random_pairs, tiny_model, tiny_tokenizer, with_lora
from training.runs import adapter_weights, make_training

from qlora_dpo.cli import main
from qlora_dpo.config.data import MixOptions
from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.mixtures.mix import mix
from qlora_dpo.data.mixtures.sampling import Sampler
from qlora_dpo.errors import DataError, Interrupted, UsageError
from qlora_dpo.training.data import TrainingData, load_training_data
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.records.tracking import read_metrics
from qlora_dpo.training.schedule import make_schedule

CATEGORIES = ["math", "chat", "left"]
RATES = {"math": 1.5, "chat": 0.4, "left": 0.0, "plain": 2.0}


def words(generator: torch.Generator) -> str:
    return " ".join(f"w{number}" for number in torch.randint(40, 128, (4,), generator=generator).tolist())


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Sixty pairs of three categories, and thirty others of which ten have a prompt of the first."""
    generator = torch.Generator().manual_seed(1)
    first = [
        {"prompt": words(generator), "chosen": words(generator), "rejected": words(generator), "category": category}
        for category in CATEGORIES
        for _ in range(20)
    ]
    second = [
        {
            "prompt": first[n]["prompt"] if n < 10 else words(generator),
            "chosen": words(generator),
            "rejected": words(generator),
        }
        for n in range(30)
    ]
    for name, rows in (("cats", first), ("plain", second)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rated(tmp_path / "mix.yaml")


def rated(path: Path, **changes: float) -> Path:
    """Write the mixture with these rates."""
    rates = RATES | changes
    ratio = [{"category_name": name, "sample_rate": rates[name]} for name in CATEGORIES]
    sources = [{"path": "cats.jsonl", "ratio": ratio}, {"path": "plain.jsonl", "sample_rate": rates["plain"]}]
    path.write_text("# rates\n" + yaml.safe_dump({"sources": sources}))
    return path


def load(mixture: Path, seed: int = 7, **options: Any) -> TrainingData:
    return load_training_data(DataOptions(dataset=str(mixture), **options), tiny_tokenizer(), seed)


def category_of(data: TrainingData, place: int) -> str:
    return data.pairs[place].category or "plain"


# What is trained on and held out


def test_prompts_are_held_out_before_anything_is_drawn(mixture: Path) -> None:
    data = load(mixture, eval_fraction=0.3)
    prompts = [tuple(pair.prompt_ids) for pair in data.pairs]
    held_out = {prompts[place] for place in data.held_out}
    assert 15 <= len(data.held_out) <= 21 and len(set(data.held_out)) == len(data.held_out)
    assert {category_of(data, place) for place in data.held_out} == {"math", "chat", "plain"}
    for epoch in range(6):
        assert not held_out & {prompts[place] for place in data.epoch(epoch)}
    assert set(data.train).isdisjoint(data.held_out) and len(data.train) + len(data.held_out) == 70


def test_an_epoch_takes_every_pair_floor_or_ceiling_of_its_rate_times(mixture: Path) -> None:
    data = load(mixture, eval_fraction=0.0)
    epochs = [Counter(data.epoch(number)) for number in range(5)]
    for epoch in epochs:
        for place in range(len(data.pairs)):
            rate = RATES[category_of(data, place)]
            assert math.floor(rate) <= epoch[place] <= math.ceil(rate)
        taken = Counter({name: 0 for name in RATES})
        for place, times in epoch.items():
            taken[category_of(data, place)] += times
        assert taken == {"math": 30, "chat": 8, "plain": 60, "left": 0}
    assert len({tuple(sorted(epoch.items())) for epoch in epochs}) == 5
    assert epochs == [Counter(load(mixture, eval_fraction=0.0).epoch(number)) for number in range(5)]
    assert epochs[0] != Counter(load(mixture, seed=8, eval_fraction=0.0).epoch(0))


def test_most_held_out_pairs_are_of_all_sources(mixture: Path) -> None:
    data = load(mixture, eval_fraction=0.5, max_eval_samples=9)
    assert len(data.held_out) <= 9
    assert len({category_of(data, place) for place in data.held_out}) > 1
    assert len(data.train) == 70 - len(data.held_out)  # those beyond the most are trained on


def test_train_takes_the_rows_that_data_mix_writes(mixture: Path, tmp_path: Path) -> None:
    for epoch in (0, 3):
        output = tmp_path / f"epoch-{epoch}.jsonl"
        mix(MixOptions(file=mixture, output=output, seed=7, epoch=epoch))
        written = [json.loads(line)["origin"] for line in output.read_text().splitlines()]
        data = load(mixture, eval_fraction=0.0)
        assert written == [data.pairs[place].origin for place in data.epoch(epoch)]


def test_eval_dataset_is_evaluated_as_it_is(mixture: Path, tmp_path: Path) -> None:
    data = load(mixture, eval_dataset=str(tmp_path / "plain.jsonl"))
    assert data.held_out == list(range(90, 120)) and len(data.train) == 70
    assert data.pairs[90].origin.endswith("plain.jsonl:1")
    assert len(data.epoch(0)) == 98


def test_summary_says_what_an_epoch_is_made_of(mixture: Path) -> None:
    lines = load(mixture, eval_fraction=0.0).summary()
    assert "math of cats: 20 at rate 1.5, 30 per epoch (30.6%)" in lines
    assert "left of cats: 20 at rate 0, 0 per epoch (0.0%)" in lines
    assert "no category of plain: 30 at rate 2, 60 per epoch (61.2%)" in lines


def test_sources_share_the_cache_of_single_data_sets(mixture: Path, tmp_path: Path) -> None:
    load(mixture)
    alone = load_training_data(DataOptions(dataset=str(tmp_path / "plain.jsonl")), tiny_tokenizer(), 7)
    assert alone.sources[0].report.from_cache and alone.mixed is None and alone.sampler is None


def test_fingerprint_knows_rates_and_rows_but_no_comments(mixture: Path) -> None:
    begun = load(mixture).fingerprint
    mixture.write_text(mixture.read_text().replace("# rates", "# other words"))
    assert load(mixture).fingerprint == begun
    assert load(rated(mixture, chat=0.5)).fingerprint != begun
    assert load(rated(mixture)).fingerprint == begun
    rows = mixture.with_name("cats.jsonl")
    rows.write_text(rows.read_text().replace("chat", "math", 1).replace("left", "chat", 1))
    assert load(mixture).fingerprint != begun


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset_format": "messages"}, "--dataset_format messages would be ignored"),
        ({"dataset_split": "test"}, "at the source that it is of"),
        ({"prompt_key": "question"}, "--prompt_key question would be ignored"),
        ({"dataset_revision": "main", "eval_dataset": "x"}, "--dataset_revision main would be ignored"),
        ({"eval_split": "test"}, "name --eval_dataset, or hold out with --eval_fraction"),
        ({"max_train_samples": 5}, "lower the rates in the mixture"),
    ],
    ids=str,
)
def test_options_of_a_single_data_set_are_refused(mixture: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(mixture, **options)


def test_rates_that_leave_nothing_are_refused(mixture: Path) -> None:
    with pytest.raises(DataError, match="leaves no row of 90"):
        load(rated(mixture, math=0, chat=0, plain=0))


def test_conversations_are_mixed_too(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    for name in ("one", "two"):
        rows = [{"prompt": words(generator), "answer": words(generator)} for _ in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"path": f"{name}.jsonl", "response_key": "answer"} for name in ("one", "two")]
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump([sources[0] | {"sample_rate": 1.5}, sources[1] | {"sample_rate": 0.5}]))
    data = load(path, objective="sft", eval_fraction=0.0)
    assert Counter(place < 10 for place in data.epoch(0)) == {True: 15, False: 5}
    categories = data.categories()
    assert categories is not None and categories.names == ("other", "one", "two")
    path.write_text(yaml.safe_dump([sources[0] | {"chosen_key": "answer"}]))
    with pytest.raises(UsageError, match="chosen_key in the mixture would be ignored: no such column is read"):
        load(path, objective="sft")
    with pytest.raises(UsageError, match="response_key in the mixture is of conversations; this command mixes pairs"):
        path.write_text(yaml.safe_dump(sources))
        mix(MixOptions(file=path))


# Steps


def test_steps_per_epoch_do_not_vary(mixture: Path) -> None:
    data = load(mixture, eval_fraction=0.0)
    schedule = make_schedule(data.train, 8, epochs=3, max_steps=-1, seed=7, sampler=data.sampler)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (13, 39)
    for epoch in range(3):
        steps = [schedule.step(13 * epoch + number) for number in range(1, 14)]
        assert [len(step) for step in steps] == [8] * 12 + [2]
        assert sorted(place for step in steps for place in step) == data.epoch(epoch)


PAIRS = random_pairs([(3, 4, 5), (6, 2, 7), (2, 8, 3), (4, 4, 4), (5, 3, 2), (7, 6, 5), (3, 3, 6)])


def drawn_training(folder: Path) -> Training:
    """Three epochs of seven pairs at rates 1.5 and 0.5, eight pairs an epoch, two a step."""
    training = make_training(
        with_lora(tiny_model(), zero=True), PAIRS, folder, steps=12, pairs_per_step=2, max_tokens=14
    )
    sampler = Sampler(np.array([0, 1, 0, 1, 0, 1, 0]), [1.5, 0.5], seed=3)
    training.schedule = make_schedule(range(7), 2, epochs=3, max_steps=-1, seed=3, sampler=sampler)
    training.saver.schedule = training.schedule
    assert training.schedule.total_steps == 12
    return training


@pytest.mark.parametrize("stop_at", [4, 6])  # after the first epoch of 4 steps, and within the second
def test_run_that_goes_on_in_the_second_epoch_equals_an_unbroken_one(stop_at: int, tmp_path: Path) -> None:
    unbroken = drawn_training(tmp_path / "unbroken")
    fit(unbroken)
    broken = drawn_training(tmp_path / "broken")

    def check() -> None:
        if len(read_metrics(broken.run.metrics)) >= stop_at:
            broken.stop.handle(signal.SIGTERM, None)
        type(broken.stop).check(broken.stop)

    broken.stop.check = check  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=f"checkpoint-{stop_at} is written"):
        fit(broken)
    continued = drawn_training(tmp_path / "broken")
    fit(continued)
    losses = [[row["loss"] for row in read_metrics(run.run.metrics)] for run in (unbroken, continued)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    weights = zip(adapter_weights(unbroken.engine.model), adapter_weights(continued.engine.model), strict=True)
    assert all(torch.equal(ours, expected) for ours, expected in weights)


# The commands


def command(name: str, model: Path, mixture: Path, *more: str) -> int:
    options = {
        "--model_name_or_path": model, "--dataset": mixture, "--gradient_accumulation_steps": 16, "--dtype": "float32",
        "--lora_r": 4, "--num_train_epochs": 2, "--eval_fraction": 0.2,
    }  # fmt: skip
    return main([name, *(str(part) for pair in options.items() for part in pair), *more])


@pytest.mark.slow
def test_train_on_a_mixture_and_what_a_change_of_rates_does(
    model_folder: Path, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = ("--output_dir", str(out), "--save_steps", "3")
    assert command("train", model_folder, mixture, *more) == 0
    assert "math" in capsys.readouterr().err
    rows, steps = read_metrics(out / "metrics.jsonl"), RunFolder(out).status()["total_steps"]
    assert len(rows) == steps and rows[-1]["epoch"] == 2
    assert {"loss/math", "rewards/margins/plain", "eval_loss/chat", "eval_count/plain"} <= set().union(*rows)
    card = (out / "README.md").read_text()
    assert "| category | held-out pairs |" in card and "| math |" in card and (out / "training_curves.png").is_file()

    shutil.rmtree(out / f"checkpoint-{steps}")  # as if it had been killed
    RunFolder(out).update_status(status="training", step=steps - 1 - (steps - 1) % 3)
    rated(mixture, chat=0.5)
    capsys.readouterr()
    assert command("train", model_folder, mixture, *more) == 2
    assert "dataset: was content" in capsys.readouterr().err
    rated(mixture)
    assert command("train", model_folder, mixture, *more) == 0
    again = read_metrics(out / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.mark.slow
def test_plan_of_a_mixture(model_folder: Path, mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", model_folder, mixture, "--use_cpu") == 0
    out = capsys.readouterr().out
    data = load(mixture, seed=42, eval_fraction=0.2)
    assert f"{2 * math.ceil(len(data.epoch(0)) / 16)} steps of 16 pairs" in out


def test_data_mix_is_a_command(mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "mix", str(mixture), "--output", str(tmp_path / "out.jsonl"), "--epoch", "1"]) == 0
    assert f"98 rows of epoch 1 (seed 42) are in {tmp_path / 'out.jsonl'}." in capsys.readouterr().out
