"""ZeRO-3: DeepSpeed partitions the frozen base over real processes, which compute the run of one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from training import test_parallel
from training.processes import free_port
from training.test_parallel import ROOT, assert_same_run, at_step, kill, run, terminate, trained

from qlora_dpo.config.training import TrainConfig
from qlora_dpo.errors import ModelError, UsageError
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.parallel import asked
from qlora_dpo.training.parallel.launching import ranks_of
from qlora_dpo.training.parallel.ranks import Ranks
from qlora_dpo.training.parallel.zero3 import partition

ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
}  # fmt: skip
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed (requirements-dev.txt)"
)
options, alone = test_parallel.options, test_parallel.alone


def note_what_is_held(this: int) -> None:
    """Say after training what this process holds of the base's weights, and how many were whole at the same time."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from qlora_dpo.models.lora import trainable_parameters
    from qlora_dpo.training import train
    from qlora_dpo.training.parallel import zero3

    gathered, fit = zero3._gathered, train.fit
    seen: list[Any] = []
    most = [0]

    @contextmanager
    def watched(weight: Any) -> Iterator[None]:
        with gathered(weight):
            seen[:] = [one for one in seen if not one.expired()] + [StorageWeakRef(weight.data.untyped_storage())]
            most[0] = max(most[0], len(seen))
            yield

    def noted(training: Any) -> None:
        fit(training)
        weights = [each for each in training.engine.model.parameters() if hasattr(each, "ds_tensor")]
        whole = sum(each.ds_numel for each in weights)
        held = sum(each.ds_tensor.numel() + each.numel() for each in weights)
        adapter = sum(each.numel() for each in trainable_parameters(training.engine.model))
        os.write(2, f"{len(weights)} weights: {held} of {whole}, {most[0]} at once, adapter {adapter}\n".encode())

    zero3._gathered, train.fit = watched, noted


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--loss_type", "sigmoid,sft", "--activation_checkpointing", "selective"),
        ("--load_in_4bit", "false", "--lora_target_modules", "q_proj", "up_proj"),
        ("--objective", "sft", "--prompt_key", "prompt", "--response_key", "chosen", "--activation_checkpointing",
         "full", "--lora_target_modules", "q_proj", "v_proj"),
    ],
    ids=["dpo_with_nll", "not_quantized", "sft"],
)  # fmt: skip
def test_two_processes_with_parts_of_the_base_compute_the_run_of_one(
    more: tuple[str, ...], options: list[Any], tmp_path: Path
) -> None:
    one = trained(1, options, tmp_path / "one", *more)
    said = run(2, options, tmp_path / "two", *more, sabotage=note_what_is_held, **ZERO3)
    assert_same_run(one, tmp_path / "two")
    found = re.findall(r"(\d+) weights: (\d+) of (\d+), (\d+) at once", said)
    assert len(found) == 2
    for weights, held, whole, at_once in found:
        assert int(weights) == 14 and int(held) == int(whole) / 2
        assert int(at_once) <= 2  # a thread of gloo may hold the last one for a moment; all would be 14


@needs_deepspeed
@pytest.mark.slow
def test_reference_can_be_an_adapter(options: list[Any], alone: Path, tmp_path: Path) -> None:
    rank = options.index("--lora_r")
    options = [*options[:rank], *options[rank + 2 :], "--reference_model", alone]
    one = trained(1, options, tmp_path / "one")
    two = trained(2, options, tmp_path / "two", **ZERO3)
    assert_same_run(one, two)


@needs_deepspeed
@pytest.mark.slow
def test_run_stops_dies_and_continues_with_parts_or_without(options: list[Any], alone: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(1, options, folder, codes=75, sabotage=partial(at_step, 2, 0, terminate))
    said = run(2, options, folder, began_with=1, codes=75, sabotage=partial(at_step, 2, 1, terminate), **ZERO3)
    assert said.count("SIGTERM at step 3: checkpoint-2 is written") == 1
    said = run(
        2, options, folder, began_with=1, codes=[71, -signal.SIGKILL], sabotage=partial(at_step, 2, 1, kill), **ZERO3
    )
    assert said.count("error:") == said.count("a process of this run is gone without a word") == 1
    run(1, options, folder)
    assert_same_run(folder, alone)


def have_unequal_memory(this: int) -> None:
    """One process would keep everything and the other recompute it; say what each does."""
    from qlora_dpo.training import train
    from qlora_dpo.training.memory import levels

    choose = train.levels_of_run

    def told(*arguments: Any) -> Any:
        chosen = choose(*arguments)
        os.write(2, f"levels {chosen}\n".encode())
        return chosen

    levels.free_after_loading = lambda _: 1.0 if this else 1e12
    train.levels_of_run = told


@needs_deepspeed
@pytest.mark.slow
def test_all_processes_keep_what_the_one_with_least_memory_can(options: list[Any], alone: Path, tmp_path: Path) -> None:
    place = options.index("--activation_checkpointing")
    options = [*options[: place + 1], "auto", *options[place + 2 :]]
    said = run(2, options, tmp_path / "run", sabotage=have_unequal_memory, **ZERO3)
    assert said.count("levels ('full', 'full')") == 2
    assert_same_run(tmp_path / "run", alone)


@needs_deepspeed
@pytest.mark.slow
def test_accelerate_starts_a_run(options: list[Any], alone: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        ROOT / "rlhf/accelerate/deepspeed_zero3.yaml", "--num_processes", "2", "--main_process_port", free_port(),
        "-m", "qlora_dpo", "train", *options, "--gradient_accumulation_steps", "4", "--output_dir", tmp_path / "run",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert RunFolder(tmp_path / "run").status()["processes"] == 2
    assert result.stderr.count("pairs to train on") == result.stderr.count("the store is read and not written") == 1
    assert_same_run(tmp_path / "run", alone)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("option", ["--load_in_8bit", "--sample_generate"])
def test_what_cannot_be_partitioned_is_refused_once(option: str, options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", option, codes=2, **ZERO3)
    assert said.count(f"error: With ZeRO-3 there is no {option}") == said.count("error") == 1


# Without processes


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ddp.yaml"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "its engine, .* is not used"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device: none"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device: none"),
        ({"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}, "zero3_init_flag: false"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "--max_grad_norm"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "gradient_accumulation_steps"),
        ({"WORLD_SIZE": "1"}, "nothing can be sharded"),
    ],
)
def test_config_that_means_something_else_is_refused(variables: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ranks_of({"RANK": "1", "WORLD_SIZE": "2"} | ZERO3 | variables)


def test_stage_that_nobody_chose_is_refused() -> None:
    with pytest.raises(UsageError, match="zero_stage: 3"):
        ranks_of({"RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"})


def test_launch_is_understood() -> None:
    ranks = ranks_of({"RANK": "1", "WORLD_SIZE": "2"} | ZERO3)
    assert ranks == Ranks(1, 2, is_sharded=True, is_zero3=True) and not ranks.shards_adapter


def test_experts_are_refused() -> None:
    layer = torch.nn.Module()
    layer.experts = torch.nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(ModelError, match=r"mixture of experts.*fsdp_qlora.yaml"):
        partition(layer, torch.device("cpu"))


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="pip install deepspeed"):
        asked.refuse_unshardable(TrainConfig(), Ranks(0, 2, is_sharded=True, is_zero3=True))
