"""Several processes compute the run that one computes, stop together, fail with one voice, and continue."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from training.processes import adapter, free_port, largest_difference, losses, start

from qlora_dpo.errors import DataError, UsageError
from qlora_dpo.training.folder.checkpoints import load_state, newest_valid
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.parallel.launching import ranks_of
from qlora_dpo.training.parallel.ranks import ALONE, Ranks, deal, is_lost, process_lost
from qlora_dpo.training.records.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
TIMES = {"step_seconds", "pairs_per_second", "conversations_per_second", "tokens_per_second", "memory/peak_gib"}


@pytest.fixture(scope="module")
def options(model_folder: Path, pairs_file: Path) -> list[Any]:
    """What all runs share; a step has 8 pairs: in 1 process 8, in 2 about 4 each."""
    return [
        "--model_name_or_path", model_folder, "--dataset", pairs_file, "--dtype", "float32", "--max_steps", str(STEPS),
        "--learning_rate", "1e-3", "--lora_r", "4", "--eval_fraction", "0.2", "--eval_steps", "2", "--save_steps", "2",
        "--activation_checkpointing", "none", "--max_tokens_per_microbatch", "40", "--use_cpu",
        "--adam_epsilon", "1e-3",  # with a small one Adam turns the rounding of a gradient near 0 into a whole step
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(options: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that all others must equal."""
    return trained(1, options, tmp_path_factory.mktemp("alone") / "run")


def run(
    count: int, options: list[Any], folder: Path, *more: Any, codes: int | list[int] = 0, began_with: int = 0,
    group: int = 1, **keywords: Any,
) -> str:  # fmt: skip
    """Train with 8 pairs per step until all processes have ended with these codes; returns what they said."""
    each = 8 // (began_with or count) // group
    wanted = [*options, "--gradient_accumulation_steps", each, "--output_dir", folder, *more]
    started = start(count, wanted, folder.with_suffix(".said"), **keywords)
    ended = started.wait()
    assert ended == ([codes] * count if isinstance(codes, int) else codes), started.said()
    return started.said()


def trained(count: int, options: list[Any], folder: Path, *more: Any, **keywords: Any) -> Path:
    run(count, options, folder, *more, **keywords)
    return folder


def record(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=1e-5) and len(losses(one)) == STEPS
    for row, same in zip(record(one), record(other), strict=True):
        assert row == pytest.approx(same, abs=1e-4, rel=1e-4)
    assert largest_difference(adapter(one), adapter(other)) < 1e-5
    assert max(value.abs().max().item() for name, value in adapter(one).items() if "lora_B" in name) > 1e-4


# What is done to one process of a run, or to all.


def at_step(number: int, rank: int, act: Callable[[], None], this: int) -> None:
    """In process `rank` call `act` in the middle of a step."""
    from qlora_dpo.training import methods
    from qlora_dpo.training.engine import Engine

    original, steps = Engine.accumulate_gradient, [0]
    learn = methods.learn_preferences

    def counted(engine: Engine, *arguments: Any) -> Any:
        steps[0] += 1
        return original(engine, *arguments)

    def acting(*arguments: Any) -> Any:
        result = learn(*arguments)
        if steps[0] == number and this == rank:
            steps[0] += 1000
            act()
        return result

    Engine.accumulate_gradient = counted  # type: ignore[method-assign]
    method = next(iter(methods.METHODS.values()))
    object.__setattr__(method, "learn", acting)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def refuse_data() -> None:
    raise DataError("pairs.jsonl:7: chosen is empty.")


def fail() -> None:
    raise ValueError("nobody thought of this")


def fill_disk(this: int) -> None:
    from qlora_dpo.training.folder import saving

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    saving.save_checkpoint = refuse


def see_other_data(this: int) -> None:
    from qlora_dpo.training import train

    train.content_of = lambda *_: {"dataset": f"of process {this}"}


def see_another_torch(this: int) -> None:
    torch.__version__ = f"of process {this}"


def lack_memory_for_the_sum(this: int) -> None:
    if this == 1:
        torch.distributed.all_reduce = lambda *_: run_out_of_memory()


def find_no_store(this: int) -> None:
    """The default store cannot be opened in one process."""
    from qlora_dpo.training import referencing

    if this == 1:
        referencing._open_store = lambda *_: None


def find_small_budget(this: int) -> None:
    """A preflight that finds another budget in each process, and a note of what each then has."""
    from qlora_dpo.training import loop

    loop.MIN_STEPS_ON_CPU = 1

    def preflight(engine: Any, *_: Any, **__: Any) -> None:
        engine.max_tokens = 60 - 20 * this

    original = loop.complete_evaluation

    def note(training: Any, done: int) -> None:
        os.write(2, f"budget {training.engine.max_tokens}\n".encode())
        original(training, done)

    loop.preflight, loop.complete_evaluation = preflight, note


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "group"),
    [
        (("--loss_type", "sigmoid,sft"), 1),
        (("--loss_type", "aot_unpaired", "--per_device_train_batch_size", "2", "--learning_rate", "3e-4"), 2),
        (("--objective", "sft", "--prompt_key", "prompt", "--response_key", "chosen"), 1),
    ],
    ids=["dpo_with_nll", "coupled", "sft"],
)
def test_two_processes_compute_the_run_of_one(
    more: tuple[str, ...], group: int, options: list[Any], tmp_path: Path
) -> None:
    one, two = (trained(count, options, tmp_path / str(count), *more, group=group) for count in (1, 2))
    assert_same_run(one, two)
    assert_same_run(one, trained(2, options, tmp_path / "sharded", *more, group=group, **FSDP))
    assert RunFolder(two).status()["pairs_per_step"] == 8
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())


@pytest.mark.slow
def test_signal_to_one_process_stops_all_and_dropout_continues_exactly(options: list[Any], tmp_path: Path) -> None:
    more = ("--lora_dropout", "0.2")
    unbroken = trained(2, options, tmp_path / "unbroken", *more)
    said = run(2, options, tmp_path / "broken", *more, codes=75, sabotage=partial(at_step, 4, 1, terminate))
    assert said.count("SIGTERM at step 4: checkpoint-3 is written") == 1
    run(2, options, tmp_path / "broken", *more)
    assert record(tmp_path / "broken") == record(unbroken)
    assert largest_difference(adapter(tmp_path / "broken"), adapter(unbroken)) == 0
    checkpoint, _ = newest_valid(unbroken)
    assert checkpoint is not None
    states = load_state(checkpoint)[1]
    assert len(states["others"]) == 1 and not torch.equal(states["torch"], states["others"][0]["torch"])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_continues_the_run(
    before: int, after: int, options: list[Any], alone: Path, tmp_path: Path
) -> None:
    run(before, options, tmp_path / "run", codes=75, sabotage=partial(at_step, 3, 0, terminate))
    said = run(after, options, tmp_path / "run", began_with=before)
    assert f"steps of 8 pairs and keeps them: about {8 // after} for each of {after} process" in said
    assert f"{before} processes wrote the checkpoint and {after} continue" in said
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "environment"), [(0, {}), (1, {}), (1, FSDP)], ids=["first", "second", "sharded"])
def test_killed_process_ends_the_run_which_continues(
    rank: int, environment: dict[str, str], options: list[Any], alone: Path, tmp_path: Path
) -> None:
    codes = [71, 71]
    codes[rank] = -signal.SIGKILL
    began = time.monotonic()
    said = run(2, options, tmp_path / "run", codes=codes, sabotage=partial(at_step, 3, rank, kill), **environment)
    assert time.monotonic() - began < 40
    assert said.count("error:") == said.count("a process of this run is gone without a word") == 1
    assert "Traceback" not in said
    run(2, options, tmp_path / "run", **environment)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("act", "code", "says"), [
    (refuse_data, 65, "error: pairs.jsonl:7: chosen is empty."), (fail, 1, "ValueError: nobody thought of this"),
])  # fmt: skip
def test_error_in_one_process_is_said_once(
    rank: int, act: Callable[[], None], code: int, says: str, options: list[Any], tmp_path: Path
) -> None:
    said = run(2, options, tmp_path / "run", codes=code, sabotage=partial(at_step, 2, rank, act))
    assert said.count(says) == 1 and said.count("rror:") == 1
    assert ("in process 1 of 2:" in said) == (rank == 1)


@pytest.mark.slow
def test_full_disk_is_said_once(options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", codes=74, sabotage=fill_disk)
    assert said.count("error: checkpoint-0 cannot be written: No space left on device") == said.count("error") == 1


@pytest.mark.slow
def test_processes_that_see_other_data_are_refused(options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", codes=65, sabotage=see_other_data)
    assert said.count("error: process 1 has data or a base other than process 0") == said.count("error") == 1
    assert "in process 1" not in said  # all noticed it, and the first one speaks


@pytest.mark.slow
def test_processes_with_other_libraries_are_refused(options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", codes=65, sabotage=see_another_torch)
    assert said.count("process 1 has a kind of device or a version of torch other than process 0") == 1


@pytest.mark.slow
def test_launch_that_all_refuse_is_refused_once(options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", codes=2, ACCELERATE_USE_MEGATRON_LM="true")
    assert said.count("error: the launcher's config says ACCELERATE_USE_MEGATRON_LM") == said.count("error") == 1


@pytest.mark.slow
def test_memory_that_is_not_enough_to_sum_gradients_ends_the_run(options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", codes=71, sabotage=lack_memory_for_the_sum)
    assert said.count("error: process 1 has no memory left to sum the gradients") == said.count("error:") == 1


@pytest.mark.slow
def test_store_that_one_process_cannot_open_is_used_by_none(options: list[Any], alone: Path, tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", sabotage=find_no_store)
    assert "from the store" not in said
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_more_processes_than_pairs_of_a_step_are_refused(options: list[Any], tmp_path: Path) -> None:
    options = [*options, "--gradient_accumulation_steps", "1", "--output_dir", tmp_path / "run"]
    stop = partial(at_step, 2, 0, terminate)
    assert start(1, options, tmp_path / "said", stop).wait() == [75]
    started = start(2, options, tmp_path / "said")
    assert started.wait() == [2, 2] and "Continue it with 1 to 1" in started.said()


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_halves_the_budget_of_all(
    options: list[Any], alone: Path, tmp_path: Path
) -> None:
    started = start(
        2, [*options, "--gradient_accumulation_steps", "4", "--output_dir", tmp_path / "run"], tmp_path / "said",
        partial(at_step, 2, 1, run_out_of_memory),
    )  # fmt: skip
    assert started.wait() == [0, 0], started.said()
    assert started.said().count("out of memory: from here on at most") == 1 and started.said(1) == ""
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_smallest_budget_of_all_processes_is_taken(options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", sabotage=find_small_budget)
    assert said.count("budget 40") == 2


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp_qlora"])
def test_accelerate_starts_a_run(config: str, options: list[Any], alone: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / f"rlhf/accelerate/{config}.yaml",
        "--num_processes", "2", "--main_process_port", free_port(), "-m", "qlora_dpo", "train", *options,
        "--gradient_accumulation_steps", "4", "--output_dir", tmp_path / "run",
    ]  # fmt: skip
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert RunFolder(tmp_path / "run").status()["processes"] == 2
    assert result.stderr.count("pairs to train on") == 1
    assert ("the store is read and not written" in result.stderr) == (config == "fsdp_qlora")
    assert_same_run(tmp_path / "run", alone)


# FSDP


@pytest.mark.slow
def test_sharded_base_computes_the_run_of_one(options: list[Any], alone: Path, tmp_path: Path) -> None:
    folder = trained(2, options, tmp_path / "run", "--activation_checkpointing", "auto", **FSDP)
    assert_same_run(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["selective", "full"])
def test_sharded_run_stops_and_continues_sharded_or_not(
    level: str, options: list[Any], alone: Path, tmp_path: Path
) -> None:
    more = ("--activation_checkpointing", level)
    stop = partial(at_step, 3, 1, terminate)
    said = run(2, options, tmp_path / "run", *more, codes=75, sabotage=stop, **FSDP)
    assert said.count("SIGTERM at step 3: checkpoint-2 is written") == 1
    count, environment = (2, FSDP) if level == "full" else (1, {})
    run(count, options, tmp_path / "run", *more, began_with=2, **environment)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_sharded_run_takes_over_one_that_was_not(options: list[Any], alone: Path, tmp_path: Path) -> None:
    run(1, options, tmp_path / "run", codes=75, sabotage=partial(at_step, 3, 0, terminate))
    run(2, options, tmp_path / "run", began_with=1, **FSDP)
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", [("--load_in_8bit",), ("--sample_generate",), ("--optim", "paged_adamw_8bit")], ids=lambda pair: pair[0]
)
def test_what_cannot_be_sharded_is_refused_once(option: tuple[str, ...], options: list[Any], tmp_path: Path) -> None:
    said = run(2, options, tmp_path / "run", *option, codes=2, **FSDP)
    assert said.count(f"error: With FSDP there is no {' '.join(option)}") == said.count("error") == 1


# Without processes


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "no tensor or pipeline parallelism"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "overflow"),
        (FSDP | {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false"),
        (FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false"),
        (FSDP | {"WORLD_SIZE": "1"}, "nothing can be sharded"),
    ],
)
def test_launch_that_means_something_else_is_refused(variables: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ranks_of({"RANK": "1", "WORLD_SIZE": "2"} | variables)


def test_slurm_file_gives_each_process_its_place(tmp_path: Path) -> None:
    scripts = {
        "srun": 'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "${@:2}"; code=$?; done; exit $code',
        "scontrol": '[ "$1" = show ] && printf "first\nsecond\n" || echo "$@"',
        "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $*"; exit 75',
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_NODELIST": "n[1-2]"}
    result = subprocess.run(
        ["bash", ROOT / "rlhf/launch/slurm.sbatch", "--run_name", "two words"], capture_output=True, text=True,
        env=slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")},
    )  # fmt: skip
    assert result.returncode == 75
    assert result.stdout.splitlines() == [
        "0/2 0 first:20007 -m qlora_dpo train --run_name two words",
        "1/2 1 first:20007 -m qlora_dpo train --run_name two words",
        "requeue 7",
    ]


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.distributed.DistBackendError("NCCL error in: x.cpp:3\nLast error:\nDuplicate GPU detected"), False),
        (torch.distributed.DistBackendError("NCCL error in: x.cpp:3, remote process exited\nLast error:\nshut"), True),
        (torch.distributed.DistNetworkError("reset"), True),
        (RuntimeError("[gloo/transport] Connection closed by peer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("socket"), False),
    ],
)
def test_lost_processes_are_told_from_other_errors(error: Exception, is_it: bool) -> None:
    assert is_lost(error) == is_it
    if is_it:
        assert str(process_lost(error)).endswith(f"What was noticed: {str(error).splitlines()[-1]}")


def test_launch_is_understood() -> None:
    assert ranks_of({}) is ALONE
    assert ranks_of({"WORLD_SIZE": "2"}) is ALONE  # some clusters set it for every job
    assert ranks_of({"RANK": "1", "WORLD_SIZE": "2"}) == Ranks(1, 2)
    assert ranks_of({"RANK": "1", "WORLD_SIZE": "2"} | FSDP) == Ranks(1, 2, is_sharded=True)


def test_one_process_exchanges_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ALONE.sum_gradients([parameter])
    ALONE.copy_main([parameter])
    assert parameter.grad is None
    assert (ALONE.gather(3), ALONE.share(3), ALONE.on_main(lambda: 3), ALONE.together(lambda: 3)) == ([3], 3, 3, [3])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_whole_and_balanced(count: int) -> None:
    costs = [7, 3, 3, 9, 1, 1, 8, 2, 6, 5, 5, 4]
    shares = deal(costs, count)
    assert sorted(place for share in shares for place in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[place] for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs) and max(loads) <= sum(costs) / count + max(costs)
