"""Law 8, measured: a faithful merge is told from one that lost the update, on what is on the disk."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model, with_lora

from qlora_dpo.cli import main
from qlora_dpo.demo.base_model import BASE
from qlora_dpo.demo.world import Question, held_out_questions, training_questions
from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.release.artefact import open_artefact
from qlora_dpo.release.fidelity import yardstick as yardsticks
from qlora_dpo.release.fidelity.measuring import Fidelity, loaded, measure
from qlora_dpo.release.fidelity.table import WIDTH, Measured, best, table, update_summary
from qlora_dpo.release.fidelity.yardstick import Yardstick, open_yardstick
from qlora_dpo.release.merging.weights import LayerUpdate, Recipe, prepare_merge, write_merged

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny_run(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the tiny model, held in NF4 and computed in float32."""
    return trained(tmp_path_factory.mktemp("runs") / "tiny", model_folder, pairs_file, 0.02)


def trained(out: Path, model_folder: Path, pairs_file: Path, learning_rate: float) -> Path:
    arguments = [
        "--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", out, "--dtype", "float32",
        "--max_steps", "4", "--learning_rate", learning_rate, "--lora_r", "4", "--eval_fraction", "0.3",
        "--gradient_accumulation_steps", "4",
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    return out


@pytest.fixture(scope="module")
def tiny_yardstick(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yardstick]:
    with opened(tiny_run, tmp_path_factory.mktemp("distributions")) as yardstick:
        yield yardstick


@pytest.fixture(scope="module")
def tiny_merged(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merged(tiny_run, Recipe("train", torch.float32), tmp_path_factory.mktemp("merged") / "train")


def opened(run: Path, folder: Path, dataset: Path | None = None, max_pairs: int = 64) -> Any:
    return open_yardstick(
        open_artefact(run), dataset=str(dataset) if dataset else None, max_pairs=max_pairs, device=CPU, folder=folder
    )


def merged(run: Path, recipe: Recipe, folder: Path) -> Path:
    write_merged(prepare_merge(open_artefact(run), CPU), recipe, folder, "5GB")
    return folder


def changed(folder: Path, copy: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model folder with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    save_file(
        {name: change(name, weight).contiguous() for name, weight in weights.items()},
        copy / "model.safetensors",
        metadata={"format": "pt"},
    )
    return copy


def in_nf4_again(name: str, weight: torch.Tensor) -> torch.Tensor:
    """What is left of a layer's weight after merging into NF4."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if "_proj" not in name:
        return weight
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    return dequantize_4bit(packed, state).to(weight.dtype)


# What the demo trains, without the demo: its base, its questions, a real run in float32.


@pytest.fixture(scope="module")
def demo_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base, trained to explain instead of answering tersely."""
    folder = tmp_path_factory.mktemp("demo")

    def write(name: str, questions: list[Question]) -> Path:
        rows = [{"prompt": one.prompt, "chosen": one.explained, "rejected": one.terse} for one in questions]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return folder / name

    arguments = [
        "--model_name_or_path", BASE, "--dataset", write("train.jsonl", training_questions()),
        "--eval_dataset", write("held_out.jsonl", held_out_questions()), "--output_dir", folder / "run",
        "--dtype", "float32", "--max_steps", "10", "--learning_rate", "0.0005", "--gradient_accumulation_steps", "8",
        "--max_length", "192", "--max_prompt_length", "96", "--eval_steps", "100", "--activation_checkpointing", "none",
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    return folder / "run"


@pytest.mark.slow
def test_merges_of_a_trained_adapter_are_told_apart(demo_adapter: Path, tmp_path: Path) -> None:
    with opened(demo_adapter, tmp_path) as yardstick:
        exact = merged(demo_adapter, Recipe("train", torch.float32), tmp_path / "exact")
        folders = {
            "train, float32": exact,
            "train, bfloat16": merged(demo_adapter, Recipe("train", torch.bfloat16), tmp_path / "half"),
            "original, bfloat16": merged(demo_adapter, Recipe("original", torch.bfloat16), tmp_path / "original"),
            "NF4 again": changed(exact, tmp_path / "nf4", in_nf4_again),
            "base only": BASE,
        }
        found = {name: measure(yardstick, folder, CPU) for name, folder in folders.items()}
        print(table(yardstick, [Measured(name, one, [], 0) for name, one in found.items()], None))
        assert yardstick.tells_kl and yardstick.tells_margin and not yardstick.notes()
        assert yardstick.facts()["pairs"] == 64 and yardstick.answers == 16

    faithful = found["train, float32"]
    assert faithful.max_logp_difference is not None and faithful.max_logp_difference < 1e-4
    assert faithful.margin_retained == pytest.approx(1, abs=1e-3) and faithful.top1_agreement == 1
    assert faithful.kl_of_scale is not None and faithful.kl_of_scale < 1e-4
    assert not faithful.is_refused and not found["train, bfloat16"].is_refused
    for name in ("NF4 again", "base only"):
        assert found[name].is_refused, name
        assert any("of the margin" in problem for problem in found[name].problems)
    base = found["base only"]
    assert base.margin_retained == pytest.approx(0, abs=0.2) and base.kl_of_scale == pytest.approx(1, abs=0.3)


def test_merge_of_the_tiny_run_is_exact_and_its_base_is_refused(
    tiny_yardstick: Yardstick, tiny_merged: Path, model_folder: Path
) -> None:
    faithful = measure(tiny_yardstick, tiny_merged, CPU)
    assert faithful.problems == faithful.warnings == []
    assert faithful.kl_mean is not None and faithful.kl_mean >= 0
    assert faithful.max_logp_difference is not None and faithful.max_logp_difference < 1e-4
    lost = measure(tiny_yardstick, model_folder, CPU)
    assert lost.margin_retained is not None and lost.margin_retained < 0.5
    assert "of what training changed" in lost.problems[0] and "of the margin" in lost.problems[1]


def test_adapter_of_a_smaller_alpha_is_refused(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    # Small steps, measured on the pairs themselves: a margin that grows with the adapter.
    run, smaller = trained(tmp_path / "run", model_folder, pairs_file, 0.003), tmp_path / "smaller"
    shutil.copytree(run, smaller, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((smaller / "adapter_config.json").read_text())
    (smaller / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0.7 * config["lora_alpha"]}))
    (tmp_path / "measured").mkdir()
    with opened(run, tmp_path / "measured", pairs_file) as yardstick:
        found = measure(yardstick, merged(smaller, Recipe("train", torch.float32), tmp_path / "out"), CPU)
    assert 0.4 < (found.margin_retained or 0) < 0.95 and 0.05 < (found.kl_of_scale or 0) < 0.2
    assert len(found.problems) == 1 and "of the margin between chosen and rejected" in found.problems[0]
    assert len(found.warnings) == 1 and found.warnings[0].endswith("read some of its answers")


def test_scale_is_what_this_training_changed(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("reference_model: null", f"reference_model: {tiny_run}"))
    with opened(run, tmp_path) as yardstick:
        assert yardstick.scale < 1e-6 and not yardstick.tells_kl and not yardstick.tells_margin


def test_nan_is_named(tiny_yardstick: Yardstick, tiny_merged: Path, tmp_path: Path) -> None:
    wrong = "model.layers.1.mlp.down_proj.weight"
    broken = changed(
        tiny_merged, tmp_path / "nan", lambda name, weight: weight * torch.nan if name == wrong else weight
    )
    found = measure(tiny_yardstick, broken, CPU)
    assert found.is_refused and found.kl_mean is None
    assert "NaN" in found.problems[0] and wrong in found.problems[0]
    large = {"model.norm.weight": 1e20, "lm_head.weight": 1e30}
    overflowing = changed(tiny_merged, tmp_path / "overflow", lambda name, weight: weight * large.get(name, 1))
    assert "its weights are finite" in measure(tiny_yardstick, overflowing, CPU).problems[0]


def test_another_vocabulary_is_refused(tiny_yardstick: Yardstick, tmp_path: Path) -> None:
    tiny_model(vocab_size=256).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"a vocabulary of 256 tokens, the trained one of 128"):
        measure(tiny_yardstick, tmp_path / "other", CPU)


def test_model_larger_than_the_memory_is_offloaded_to_the_disk(
    tiny_yardstick: Yardstick, tiny_merged: Path, monkeypatch: Any
) -> None:
    small = {"cpu": 20_000}
    with loaded(tiny_merged, CPU, small) as model:
        assert "disk" in model.hf_device_map.values() and any(weight.is_meta for weight in model.parameters())
    found, expected = (measure(tiny_yardstick, tiny_merged, CPU, memory) for memory in (small, None))
    assert found.max_logp_difference == pytest.approx(expected.max_logp_difference, abs=1e-6)
    assert not found.is_refused
    assert {path.name for path in tiny_merged.parent.iterdir()} == {"train"}


def test_no_model_is_left_in_memory(tiny_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    models: list[weakref.ref[Any]] = []
    load = yardsticks.load_as_trained

    def noted(*arguments: Any) -> Any:
        model = load(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(yardsticks, "load_as_trained", noted)
    with opened(tiny_run, tmp_path):
        assert [model() for model in models] == [None]
    assert list(tmp_path.iterdir()) == []


def test_untrained_adapter_says_that_nothing_can_be_said(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    policy = with_lora(AutoModelForCausalLM.from_pretrained(model_folder), zero=True)
    (tmp_path / "adapter").mkdir()
    save_adapter(policy, tmp_path / "adapter")
    with opened(tmp_path / "adapter", tmp_path, pairs_file, max_pairs=4) as yardstick:
        assert "it is untrained, or its updates are 0" in yardstick.notes()[0]
        assert "rounding alone moves it by" in yardstick.notes()[1]
        little = replace(yardstick, reference=replace(yardstick.reference, kl=yardstick.reference.kl + 1e-4))
        noisy = replace(little, again=replace(yardstick.again, kl=yardstick.again.kl + 1e-4))
        assert noisy.notes()[0].startswith("The adapter is 0.0001 of KL per token from its base, and rounding alone is")
        assert little.tells_kl and not noisy.tells_kl
        assert yardstick.facts()["pairs"] == 4
        found = measure(yardstick, model_folder, CPU)
        assert (found.kl_of_scale, found.margin_retained, found.problems) == (None, None, [])
        assert json.dumps(yardstick.facts(), allow_nan=False)
        printed = table(yardstick, [Measured("original, float32", found, [], 0)], None)
    assert "untrained" in printed and "nan" not in printed and "inf" not in printed


@pytest.mark.slow
def test_conversations_of_an_sft_run_are_measured_without_margins(model_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"w{n} w7"}, {"role": "assistant", "content": f"w{n + 1} w9 w8"}]}
        for n in range(10, 40)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "--objective", "sft", "--model_name_or_path", model_folder, "--dataset", tmp_path / "chats.jsonl",
        "--output_dir", tmp_path / "run", "--dtype", "float32", "--max_steps", "4", "--learning_rate", "0.02",
        "--eval_fraction", "0.2",
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0
    with opened(tmp_path / "run", tmp_path) as yardstick:
        folder = merged(tmp_path / "run", Recipe("train", torch.float32), tmp_path / "merged")
        found, lost = measure(yardstick, folder, CPU), measure(yardstick, model_folder, CPU)
        printed = table(yardstick, [Measured("train, float32", found, [], 0)], "train, float32")
    assert yardstick.pairs == 0 and found.margin is None and not found.is_refused and lost.is_refused
    assert "conversations" in printed


@pytest.mark.parametrize(("eval_fraction", "error"), [("0.0", "held out nothing"), ("0.3", "cannot be read again")])
def test_nothing_to_measure_on(eval_fraction: str, error: str, tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    text = (run / "config.yaml").read_text().replace("eval_fraction: 0.3", f"eval_fraction: {eval_fraction}")
    if eval_fraction != "0.0":
        text = text.replace("pairs.jsonl", "gone.jsonl")
    (run / "config.yaml").write_text(text)
    with pytest.raises((UsageError, StorageError), match=rf"{error}.*--dataset"), opened(run, tmp_path):
        pass


def test_foreign_adapter_needs_a_dataset(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(tiny_run / name, tmp_path / "adapter" / name)
    with (
        pytest.raises(UsageError, match=r"of no run that held out pairs.*--dataset"),
        opened(tmp_path / "adapter", tmp_path),
    ):
        pass
    with pytest.raises(UsageError, match="--fidelity_pairs 0"), opened(tiny_run, tmp_path, max_pairs=0):
        pass


GOOD = Fidelity(kl_mean=0.01, kl_of_scale=0.012, margin_retained=0.99)


def of(name: str, **values: Any) -> Measured:
    return Measured(name, replace(GOOD, **values), [], 0)


def test_best_is_the_nearest_that_is_not_refused_and_of_equals_the_first() -> None:
    near, equal, nearer = of("near"), of("equal", kl_mean=0.011, kl_of_scale=0.0198), of("nearer", kl_of_scale=0.0001)
    refused = of("refused", kl_of_scale=0.0, problems=["it keeps nothing"])
    broken = Measured("broken", Fidelity(problems=["NaN"]), [], 0)
    assert best([broken, equal, near, refused]) is equal
    assert best([broken, near, equal, nearer, refused]) is nearer
    assert best([refused, broken]) is None
    assert best([broken, refused], force=True) is refused
    unscaled = [of(name, kl_mean=kl, kl_of_scale=None) for name, kl in (("far", 0.02), ("near", 0.01))]
    assert best(unscaled) is unscaled[1]


def test_update_summary_names_where_storage_keeps_least() -> None:
    updates = [LayerUpdate("a", 0.01, 0.9, 0.2), LayerUpdate("b", 0.02, 0.5, 0.6), LayerUpdate("c", 0.03, 1.0, 0.0)]
    assert update_summary(updates) == {
        "update_size": 0.02, "update_kept": 0.9, "update_lost": 0.2, "update_kept_worst": 0.5,
        "update_kept_worst_layer": "b",
    }  # fmt: skip
    assert update_summary([*updates, LayerUpdate("zero", 0.0, 1.0, 0.0)]) == update_summary(updates)
    assert update_summary([]) == update_summary([LayerUpdate("zero", 0.0, 1.0, 0.0)]) == {}


def test_table_fits_a_terminal_and_says_why(tiny_yardstick: Yardstick) -> None:
    updates = [LayerUpdate(f"model.layers.{n}.self_attn.q_proj.weight", 0.01, 0.9, 0.2) for n in range(3)]
    measured = [
        Measured("train, bfloat16", replace(GOOD, warnings=["its KL is 12 %"]), updates, 10),
        of("original, bfloat16", problems=["it keeps 3 % of the margin"]),
        Measured("original, float16", Fidelity(problems=["NaN"]), [], 0),
    ]
    printed = table(tiny_yardstick, measured, "train, bfloat16")
    assert max(len(line) for line in printed.splitlines()) <= WIDTH == 80
    words = " ".join(printed.split())
    for expected in (
        "train, bfloat16 *", "12 pairs (held out by the run)", "without the adapter", "100.0 %",
        "original, bfloat16: refused, it keeps 3 % of the margin.", "train, bfloat16: its KL is 12 %.",
        "at worst it keeps 90.0 % in model.layers.0.self_attn.q_proj.weight.",
    ):  # fmt: skip
        assert expected in words
