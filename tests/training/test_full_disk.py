"""A full disk: the old checkpoint stays, the run goes on for half an hour, and no line of the record is torn."""

from __future__ import annotations

import errno
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
import torch
from tiny import random_pairs, tiny_model, with_lora
from training.runs import make_training

from qlora_dpo.errors import Interrupted, StorageError
from qlora_dpo.training.folder import checkpoints as checkpoints_module
from qlora_dpo.training.folder.checkpoints import checkpoints, disk_errors, newest_valid
from qlora_dpo.training.folder.run_folder import RunFolder, write_atomically
from qlora_dpo.training.folder.saving import checkpoint_bytes
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.records.tracking import Recorder, cut_back, read_metrics

ROOT = Path(__file__).resolve().parents[2]
PAIRS = random_pairs([(3, 4, 5), (6, 2, 7), (2, 8, 3), (4, 4, 4)])


class Disk:
    """Refuses to write checkpoints while `is_full`; its clock goes on by `minutes` with each step."""

    def __init__(self, training: Training, monkeypatch: pytest.MonkeyPatch, full_steps: range, minutes: float) -> None:
        self._step, self._full_steps, self._minutes, self.attempts = 0, full_steps, minutes, []
        sync, accumulate = checkpoints_module.sync, training.engine.accumulate_gradient

        def refuse(path: Path) -> None:
            if self._step in self._full_steps:
                self.attempts += [] if self._step in self.attempts else [self._step]
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(path)

        def counted(*arguments: Any) -> Any:
            self._step += 1
            return accumulate(*arguments)

        monkeypatch.setattr(checkpoints_module, "sync", refuse)
        training.engine.accumulate_gradient = counted  # type: ignore[method-assign]
        training.saver.clock = lambda: self._minutes * 60 * self._step


def training_on(folder: Path, **options: Any) -> Training:
    settings = {"steps": 12, "pairs_per_step": 2, "save_steps": 2} | options
    return make_training(with_lora(tiny_model(), zero=True), PAIRS, folder, **settings)


def test_run_goes_on_and_saves_again_as_soon_as_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = training_on(tmp_path)
    disk = Disk(training, monkeypatch, full_steps=range(4, 8), minutes=1)
    seen: dict[int, list[int]] = {}
    original = training.recorder.log

    def log(step: int, metrics: dict[str, float]) -> None:
        seen[step] = [number for number, _ in checkpoints(tmp_path)]
        assert not list(tmp_path.glob(".staging*"))
        original(step, metrics)

    training.recorder.log = log  # type: ignore[method-assign]
    fit(training)
    assert disk.attempts == [4, 5, 6, 7]  # every minute, not only every other step
    assert seen[3] == seen[8] == [0, 2] and seen[9] == [2, 8]  # step 8 is free again
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 12] and newest_valid(tmp_path)[1] == []
    error = capsys.readouterr().err
    assert error.count("checkpoint-4 cannot be written (No space left on device)") == 1
    assert error.count("cannot be written") == 1 and error.count("can be written again") == 1
    assert "checkpoint-2 is safe" in error


def test_failed_attempts_are_not_repeated_within_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_on(tmp_path, save_steps=4)
    disk = Disk(training, monkeypatch, full_steps=range(4, 8), minutes=0.4)
    fit(training)
    assert disk.attempts == [4, 7]


def test_run_stops_after_half_an_hour_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_on(tmp_path)
    disk = Disk(training, monkeypatch, full_steps=range(4, 100), minutes=8)
    with pytest.raises(StorageError) as stopped:
        fit(training)
    assert disk.attempts == [4, 5, 6, 7, 8]  # 32 minutes after the first refusal
    assert str(stopped.value).startswith("no checkpoint could be written for 32 minutes: No space left on device")
    assert "checkpoint-2 is safe" in str(stopped.value)
    assert newest_valid(tmp_path) == (tmp_path / "checkpoint-2", [])


@pytest.mark.parametrize("first_full", [3, 1])
def test_last_step_that_cannot_be_saved_stops_the_run(
    first_full: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_on(tmp_path, steps=3)
    Disk(training, monkeypatch, full_steps=range(first_full, 100), minutes=1)
    with pytest.raises(StorageError, match=r"^checkpoint-3 cannot be written: No space left on device\.") as stopped:
        fit(training)
    assert f"checkpoint-{2 if first_full == 3 else 0} is safe" in str(stopped.value)


@pytest.mark.parametrize("save_steps", [2, 3])
def test_signal_on_a_full_disk_names_the_last_safe_checkpoint(
    save_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = training_on(tmp_path, save_steps=save_steps)
    Disk(training, monkeypatch, full_steps=range(5, 100), minutes=1)
    evaluated = training.recorder.log

    def log(step: int, metrics: dict[str, float]) -> None:
        evaluated(step, metrics)
        if step == 4:
            training.stop.handle(signal.SIGTERM, None)

    training.recorder.log = log  # type: ignore[method-assign]
    if save_steps == 2:  # checkpoint-4 is there already, so nothing has to be written
        with pytest.raises(Interrupted, match="checkpoint-4 is written"):
            fit(training)
        assert newest_valid(tmp_path) == (tmp_path / "checkpoint-4", [])
    else:
        with pytest.raises(StorageError, match=r"^checkpoint-4 cannot be written: .*checkpoint-3 is safe"):
            fit(training)
        assert newest_valid(tmp_path) == (tmp_path / "checkpoint-3", [])


def test_run_json_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = training_on(tmp_path, steps=4)

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qlora_dpo.training.folder.run_folder.write_atomically", refuse)
    fit(training)
    assert newest_valid(tmp_path) == (tmp_path / "checkpoint-4", [])
    assert "run.json cannot be written: No space left on device" in capsys.readouterr().err
    with pytest.raises(StorageError, match=r"run\.json"):
        RunFolder(tmp_path).update_status(status="finished")


def test_samples_that_cannot_be_written_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = training_on(tmp_path, steps=2)

    def refuse(step: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    training.show_samples = refuse
    fit(training)
    assert "samples of step 2 cannot be written: No space left on device" in capsys.readouterr().err


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within this block the system itself refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_metrics_line_that_cannot_be_written_is_kept_whole_for_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.jsonl"
    recorder = Recorder(file, [])
    recorder.log(1, {"loss": 0.5})
    with largest_file(file.stat().st_size + 10):  # ten bytes of the next line would still go in
        for step in (2, 3):
            recorder.log(step, {"loss": 0.25})
    assert file.read_text() == '{"step": 1, "loss": 0.5}\n'
    recorder.log(4, {"loss": 0.125})
    recorder.finish()
    assert [(row["step"], row["loss"]) for row in read_metrics(file)] == [(1, 0.5), (2, 0.25), (3, 0.25), (4, 0.125)]
    assert caplog.text.count("File too large") == 1


def test_lines_that_never_found_room_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(tmp_path / "metrics.jsonl", [])
    with largest_file(10):
        recorder.log(1, {"loss": 0.5})
        recorder.log(2, {"loss": 0.5})
        recorder.finish()
    assert "lacks its last 2 lines" in caplog.text


def test_continuing_on_a_full_disk_does_not_lose_the_record(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in range(1, 9))
    file.write_text(lines)
    with largest_file(20), pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: File too large"):
        cut_back(file, 5)
    assert file.read_text() == lines
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_failed_replacement_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text("old")
    with largest_file(20), pytest.raises(OSError):
        write_atomically(file, "new" * 20)
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("limit", "left"), [(10_000, []), (40_000, [0])])
def test_what_safetensors_and_torch_report_is_understood(
    limit: int, left: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = training_on(tmp_path, steps=3)  # the adapter has 30 kB, the optimizer's state after step 1 twice that
    failed = 3 if left else 0
    with largest_file(limit), pytest.raises(StorageError, match=f"^checkpoint-{failed} cannot be written: File too l"):
        fit(training)
    assert ("checkpoint-2 cannot be written (File too large)" in capsys.readouterr().err) == bool(left)
    assert [step for step, _ in checkpoints(tmp_path)] == left and not list(tmp_path.glob(".staging*"))


def test_disk_that_takes_no_checkpoint_is_found_before_the_first_step(tmp_path: Path) -> None:
    training = training_on(tmp_path)
    with largest_file(10_000), pytest.raises(StorageError, match="No checkpoint has been written yet: make room"):
        fit(training)
    assert read_metrics(training.run.metrics) == [] and checkpoints(tmp_path) == []


def test_too_little_room_is_refused_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = training_on(tmp_path)
    size = checkpoint_bytes(training.engine.model, training.optimizer)

    def free(count: float) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=int(count * size)))

    free(2.9)
    with pytest.raises(StorageError) as refused:
        fit(training)
    have, each, needed = (f"{count * size / 2**20:.1f} MiB" for count in (2.9, 1, 3))
    assert f"has {have} free, and 3 checkpoints of {each} each need {needed}" in str(refused.value)
    assert checkpoints(tmp_path) == []
    free(3.1)
    fit(training)
    free(1.1)  # a continued run has two of the three already
    fit(training_on(tmp_path))
    free(0.9)
    with pytest.raises(StorageError, match="and a checkpoint needs "):
        fit(training_on(tmp_path))


def test_room_is_counted_as_the_files_turn_out(tmp_path: Path) -> None:
    training = make_training(with_lora(tiny_model(), r=32, zero=True), PAIRS, tmp_path, steps=2)
    fit(training)
    files = [file.stat().st_size for file in (tmp_path / "checkpoint-2").iterdir()]
    assert sum(files) == pytest.approx(checkpoint_bytes(training.engine.model, training.optimizer), rel=0.1)


@pytest.mark.parametrize("numbers", [1_000, 100_000])  # torch fails while it writes, or Python when it closes the file
def test_reason_survives_what_torch_makes_of_it(numbers: int, tmp_path: Path) -> None:
    with largest_file(3_000), pytest.raises(OSError, match="File too large"), disk_errors():
        checkpoints_module._save_tensors({"state": torch.zeros(numbers)}, tmp_path / "optimizer.pt")


def test_other_errors_of_torch_are_not_taken_for_a_full_disk() -> None:
    with pytest.raises(RuntimeError, match="device-side assert"), disk_errors():
        raise RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError), disk_errors():
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [200_000, 700_000])  # the adapter has 524 kB, the optimizer's state twice that
def test_command_ends_with_one_sentence(limit: int, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    options = {
        "--model_name_or_path": model_folder, "--dataset": pairs_file, "--output_dir": tmp_path / "run",
        "--max_steps": 4, "--save_steps": 2, "--gradient_accumulation_steps": 4, "--dtype": "float32",
    }  # fmt: skip
    arguments = [str(part) for pair in options.items() for part in pair]
    small_files = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    done = forks.run(["train", *arguments], tmp_path, before=small_files)
    assert done.returncode == 74 and "Traceback" not in done.stderr, done.stderr
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    if limit == 200_000:
        assert "error: checkpoint-0 cannot be written: File too large" in done.stderr and steps == []
    else:
        assert "checkpoint-2 cannot be written (File too large)" in done.stderr and steps == [1, 2, 3, 4]
        assert "error: checkpoint-4 cannot be written: File too large" in done.stderr
