"""The plan: its numbers are those of the parts, its words say what to do, and it loads no weights."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model, with_lora

from qlora_dpo.cli import main
from qlora_dpo.models.activation_checkpointing import LEVELS
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.models.skeleton import build_skeleton
from qlora_dpo.training.memory import prediction as memory_plan
from qlora_dpo.training.schedule import make_schedule
from qlora_dpo.training.speed import CARDS, UTILIZATION, card_rate, count_flops, rates, work_of_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder_33b(tmp_path: Path) -> Path:
    """A LLaMA-33B of which only the config is there."""
    config = tiny_config(
        hidden_size=6656, num_hidden_layers=60, num_attention_heads=52, num_key_value_heads=52, head_dim=128,
        intermediate_size=17920, vocab_size=32000,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama-33b")
    return tmp_path / "llama-33b"


def plan(*options: str | Path) -> int:
    return main(["plan", *map(str, options)])


def row(text: str, name: str) -> float:
    found = re.search(rf"^  {re.escape(name)}[^\d\n]*? +([\d.]+)", text, re.MULTILINE)
    assert found, f"no row {name} in\n{text}"
    return float(found[1])


@pytest.mark.slow
def test_33b_from_a_config_alone_is_quick_and_small(folder_33b: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "qlora_dpo", "plan", "--model_name_or_path", folder_33b, "--gpu_memory", "80"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    text = (tmp_path / "out").read_text()
    assert process.returncode == 0, text
    # Processor time, not wall time: the machine may be busy. On an idle one it is about 7 seconds, most of it imports.
    assert usage.ru_utime + usage.ru_stime < 30
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 1e9:  # a child's peak starts at its parent's
        assert usage.ru_maxrss * 1024 < 1e9
    gib = 2**30 / 1e9
    assert row(text, "quantized weights") * gib == pytest.approx(16.56, abs=0.01)
    assert row(text, "other weights") * gib == pytest.approx(0.85, abs=0.01)
    assert row(text, "adapter") * gib == pytest.approx(487.6e6 * 4 / 1e9, abs=0.01)
    assert "487.6 M parameters" in text
    assert re.search(r"selective on \d+ layers, none on \d+ layers \(the least recomputation that fits\)", text)
    assert "tokens in the training pairs" not in text


def test_rows_add_up_and_fit(folder_33b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model_name_or_path", folder_33b, "--gpu_memory", "24") == 0
    text = capsys.readouterr().out
    table = text.partition("GiB):\n")[2].partition("  together")[0]
    sizes = [float(line.split()[-1]) for line in table.splitlines()]
    assert sum(sizes) == pytest.approx(row(text, "together"), abs=0.01) and sum(sizes) <= 24
    assert "offload on" in text and "CPU memory hold what is offloaded" in text


@pytest.mark.slow
def test_budget_is_halved_until_it_fits(folder_33b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["--model_name_or_path", str(folder_33b), "--max_tokens_per_microbatch", "32768"]
    assert plan(*wide, "--gpu_memory", "24") == 0
    text = capsys.readouterr().out
    found = re.search(r"Tokens at once \(--max_tokens_per_microbatch\): (\d+), because 32768 do not fit", text)
    assert found and int(found[1]) in (4096, 8192, 16384)


@pytest.mark.slow
def test_what_does_not_fit_says_what_helps(folder_33b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model_name_or_path", str(folder_33b), "--gpu_memory", "16", "--optim", "adamw_torch"]
    assert plan(*small) == 71
    captured = capsys.readouterr()
    assert row(captured.out, "quantized weights") > 15  # the table is there all the same
    assert "lower --lora_r" in captured.err and "--optim paged_adamw_8bit" in captured.err
    assert "--load_in_4bit" not in captured.err  # it is on


def test_asked_level_is_shown_as_asked(folder_33b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--model_name_or_path", folder_33b, "--gpu_memory", "80", "--activation_checkpointing", "full") == 0
    assert "full on all 60 layers (as asked)" in capsys.readouterr().out


def test_plan_with_data_counts_tokens_steps_hours_and_cost(
    model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qlora_dpo.models.loading

    monkeypatch.setattr(qlora_dpo.models.loading, "load_base", None)
    run = ["--model_name_or_path", str(model_folder), "--dataset", str(pairs_file), "--eval_fraction", "0.1"]
    assert plan(*run, "--tokens_per_second", "10", "--gpu_price_per_hour", "3600", "--num_train_epochs", "2") == 0
    text = capsys.readouterr().out
    assert "36 pairs to train on, 4 held out" in text and "6 steps of 16 pairs" in text
    found = re.search(r"([\d,]+) tokens in the training pairs; sharing prompts saves ([\d,]+) of ([\d,]+)", text)
    assert found
    tokens, saved, apart = (int(number.replace(",", "")) for number in found.groups())
    assert tokens + saved == apart and saved > 0
    assert f"{2 * tokens:,} tokens to train on" in text
    cost = re.search(r"at --tokens_per_second: .*, cost ([\d,.]+) at 3600 per hour \(10 trained tokens", text)
    assert cost  # a second costs 1; the reference and the evaluations come on top of the training
    assert 2 * tokens / 10 < float(cost[1].replace(",", "")) < 2 * 2 * tokens / 10


def test_plan_on_a_cpu_measures_a_product(
    model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--model_name_or_path", model_folder, "--dataset", pairs_file) == 0
    text = capsys.readouterr().out
    assert "Time, an estimate" in text and "of a matrix product" in text
    assert "adamw_torch" in text and "offload" not in text and "none on all 2 layers" in text


def test_plan_for_another_machine_names_cards(
    model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("here the card at hand is named")
    assert plan("--model_name_or_path", model_folder, "--dataset", pairs_file, "--gpu_memory", "24") == 0
    text = capsys.readouterr().out
    assert all(f"on {card} at 40% of its peak" in text for card in ("H100", "A100", "RTX 4090"))


def test_adapter_as_reference_counts_twice_with_its_own_rank(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sft").mkdir()
    save_adapter(with_lora(tiny_model(), r=32), tmp_path / "sft")
    adapters = []
    for options in (["--lora_r", "32"], ["--reference_model", str(tmp_path / "sft")]):
        assert plan("--model_name_or_path", model_folder, *options) == 0
        adapters.append(row(capsys.readouterr().out, "adapter"))
    assert adapters[1] == pytest.approx(2 * adapters[0], abs=0.002)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}, "padded rows"),
        ("llama", {}, "none on all 2 layers"),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2,
             "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4,
             "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
            "cannot be counted",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bits", ["4", "8", "16"])
def test_every_kind_of_model_gets_a_plan(
    family: str, changes: dict[str, object], says: str, bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(family, **changes).save_pretrained(tmp_path)
    quantization = {"4": [], "8": ["--load_in_8bit"], "16": ["--load_in_4bit", "false"]}[bits]
    assert plan("--model_name_or_path", tmp_path, "--gpu_memory", "8", *quantization) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ([], 2, "--model_name_or_path"),
        (["--model_name_or_path", "MODEL", "--gpu_memory", "0"], 2, "above 0"),
        (["--model_name_or_path", "MODEL", "--gpu_price_per_hour", "2"], 2, "--dataset"),
        (["--model_name_or_path", "MODEL", "--use_cpu", "--gpu_memory", "24"], 2, "--use_cpu"),
        (["--model_name_or_path", "MODEL", "--lora_target_modules", "nothing"], 2, "linear layers are"),
        (["--model_name_or_path", "./nowhere"], 74, "no such model folder"),
    ],
)
def test_mistakes_are_one_clear_text(
    options: list[str], code: int, words: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(*(str(model_folder) if option == "MODEL" else option for option in options)) == code
    assert words in capsys.readouterr().err


def test_operations_per_token() -> None:
    skeleton = build_skeleton(tiny_config(), quantization=None, dtype=torch.float32, r=4, target_modules=["all-linear"])
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    adapter = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert (skeleton.weights.active_parameters, skeleton.adapter_parameters) == (weights, adapter)
    trained = {level: count_flops(skeleton, [level] * 2, in_4_bit=True).trained for level in LEVELS}
    assert trained["none"] == 4 * weights + 6 * adapter
    assert trained["selective"] == trained["none"] + 2 * adapter
    assert trained["full"] == trained["none"] + 2 * (weights + adapter)
    mixed = count_flops(skeleton, ["full", "none"], in_4_bit=True)
    assert mixed.trained == (trained["none"] + trained["full"]) / 2
    assert count_flops(skeleton, ["selective"], in_4_bit=False).trained == trained["full"]
    assert (mixed.reference, mixed.target_trained) == (2 * weights, 4 * 64 * 128)


def test_work_counts_the_reference_once_and_every_evaluation() -> None:
    costs = np.array([10, 20, 30, 40])
    schedule = make_schedule(range(4), 2, epochs=3, max_steps=-1, seed=0)
    work = work_of_run(costs, costs // 2, schedule=schedule, held_out=2, eval_steps=4)
    assert (work.trained, work.reference, work.evaluated) == (300, 6 * 25, 2 * 2 * 25)
    assert work.trained_targets == 150


def test_cards_are_found_by_the_name_that_the_driver_gives() -> None:
    assert card_rate("NVIDIA H100 80GB HBM3") == ("H100", UTILIZATION * CARDS["H100"] * 1e12)
    for name, card in (
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A40", "A40"),
    ):
        found = card_rate(name)
        assert found is not None and found[0] == card
    assert card_rate("Some other card") is None
    assert len(rates(None, torch.bfloat16)) == 3


def test_memory_of_this_machine_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_dpo.config.training import ModelOptions, PlanOptions, TrainConfig

    monkeypatch.setattr(memory_plan, "available_cpu_memory", lambda: 10 * 2**30)
    machine = memory_plan.machine_of(TrainConfig(model=ModelOptions(use_cpu=True)), PlanOptions())
    assert (machine.device_type, machine.capacity) == ("cpu", 8 * 2**30)
