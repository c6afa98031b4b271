"""A signal leaves the run cleanly in every phase, within one micro-batch, and outside the loop at once."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import forks
import pytest
from tiny import random_pairs, tiny_model, tiny_tokenizer, with_lora
from training.runs import make_training

from qlora_dpo.cli import COMMANDS, main
from qlora_dpo.command_line import Command
from qlora_dpo.errors import Interrupted
from qlora_dpo.training import loop
from qlora_dpo.training.folder.checkpoints import checkpoints, newest_valid
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.loop import Training, fit
from qlora_dpo.training.records.tracking import read_metrics
from qlora_dpo.training.samples import SamplePrinter
from qlora_dpo.training.signals import StopFlag, StopRequested, Terminated, stop_on_signals, terminable

ROOT = Path(__file__).resolve().parents[2]
PAIRS = random_pairs([(3, 4, 5), (6, 2, 7), (2, 8, 3), (4, 4, 4), (5, 3, 2), (7, 6, 5)])
TIMES = {"step_seconds", "pairs_per_second", "tokens_per_second", "memory/peak_gib"}


def training_on(folder: Path, **options: Any) -> Training:
    settings = {"steps": 4, "pairs_per_step": 2, "max_tokens": 14, "eval_steps": 2} | options
    training = make_training(with_lora(tiny_model(), zero=True), PAIRS, folder, **settings)
    training.eval_indices = [0, 1, 2, 3]
    return training


def kept(training: Training) -> list[dict[str, Any]]:
    """The record without what depends on the machine."""
    rows = read_metrics(training.run.metrics)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def count_micro_batches(training: Training) -> list[int]:
    """A list that grows with every micro-batch of policy or reference."""
    calls: list[int] = []
    scorer = training.engine.scorer

    class Counted(type(scorer)):  # type: ignore[misc]
        def per_token_logps_and_squares(self, *arguments: Any, **keywords: Any) -> Any:
            calls.append(training.stop.signal_name is not None)
            return super().per_token_logps_and_squares(*arguments, **keywords)

    training.engine.scorer = Counted(scorer.kind, scorer.head)
    return calls


def raise_in(training: Training, name: str, call: int) -> None:
    """The `call`-th time that this phase begins, SIGTERM arrives."""
    numbers = iter(range(1, 1000))
    owner: Any = training if name == "show_samples" else training.engine
    original: Callable[..., Any] = getattr(owner, name)

    def signaled(*arguments: Any) -> Any:
        if next(numbers) == call:
            training.stop.handle(signal.SIGTERM, None)
        return original(*arguments)

    setattr(owner, name, signaled)


@pytest.mark.parametrize(
    ("phase", "call", "step", "says"),
    [
        ("accumulate_gradient", 1, 0, "at step 1: checkpoint-0"),
        ("accumulate_gradient", 3, 2, "at step 3: checkpoint-2"),
        ("evaluate", 1, 2, "during an evaluation: checkpoint-2"),
        ("evaluate", 2, 4, "during an evaluation: checkpoint-4"),  # the last step's
    ],
)
def test_signal_stops_before_the_next_micro_batch_and_nothing_is_missing_later(
    phase: str, call: int, step: int, says: str, tmp_path: Path
) -> None:
    unbroken = training_on(tmp_path / "unbroken")
    fit(unbroken)

    training = training_on(tmp_path / "broken")
    raise_in(training, phase, call)
    micro_batches = count_micro_batches(training)
    with pytest.raises(Interrupted, match=f"SIGTERM {says} is written; the same command continues"):
        fit(training)
    assert not any(micro_batches)  # none began after the signal
    assert newest_valid(tmp_path / "broken") == (tmp_path / "broken" / f"checkpoint-{step}", [])
    continued = training_on(tmp_path / "broken")
    fit(continued)
    assert kept(continued) == kept(unbroken)
    assert [row["step"] for row in kept(continued) if "eval_loss" in row] == [2, 4]


def test_second_signal_while_an_evaluation_is_made_up_for_loses_no_line(tmp_path: Path) -> None:
    unbroken = training_on(tmp_path / "unbroken")
    fit(unbroken)
    for _ in range(3):
        training = training_on(tmp_path / "broken")
        raise_in(training, "evaluate", 1)
        with pytest.raises(Interrupted, match="during an evaluation: checkpoint-2 is written"):
            fit(training)
    continued = training_on(tmp_path / "broken")
    fit(continued)
    assert kept(continued) == kept(unbroken)


def test_signal_in_the_reference_pass_is_answered_before_the_next_micro_batch(tmp_path: Path) -> None:
    training = training_on(tmp_path)
    score = training.engine.reference._score

    def signaled(batch: Any) -> Any:
        training.stop.handle(signal.SIGINT, None)
        return score(batch)

    training.engine.reference._score = signaled  # type: ignore[method-assign]
    micro_batches = count_micro_batches(training)
    with pytest.raises(Interrupted, match="SIGINT at step 1"):
        fit(training)
    assert sum(micro_batches) == 1  # the one that it came in


@pytest.mark.parametrize("after", [0, 3])
def test_samples_stop_between_two_tokens(after: int, tmp_path: Path) -> None:
    training = training_on(tmp_path)
    tokens: list[int] = []

    def pause() -> None:
        tokens.append(1)
        if len(tokens) > after:
            training.stop.handle(signal.SIGTERM, None)
        training.stop.check()

    file = tmp_path / "samples.jsonl"
    training.show_samples = SamplePrinter(
        training.engine.model, tiny_tokenizer(), [[1, 5, 6], [1, 7]], file, max_new_tokens=50, end_id=127, pause=pause
    )
    with pytest.raises(Interrupted, match="during an evaluation: checkpoint-2"):
        fit(training)
    assert len(tokens) == after + 1 and not file.exists()
    continued = training_on(tmp_path)
    continued.show_samples = SamplePrinter(
        continued.engine.model, tiny_tokenizer(), [[1, 5, 6]], file, max_new_tokens=3, end_id=127, pause=lambda: None
    )
    fit(continued)
    assert [row["step"] for row in read_metrics(file)] == [2, 4]


def test_samples_after_the_checkpoint_that_a_run_continues_from_are_not_kept_twice(tmp_path: Path) -> None:
    def training() -> Training:
        made = training_on(tmp_path, save_steps=3)
        made.show_samples = SamplePrinter(
            made.engine.model, tiny_tokenizer(), [[1, 5]], tmp_path / "samples.jsonl", max_new_tokens=2, end_id=127,
            pause=lambda: None,
        )  # fmt: skip
        return made

    killed = training()
    killed.saver.save = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    with pytest.raises(ZeroDivisionError):
        fit(killed)
    fit(training())
    assert [row["step"] for row in read_metrics(tmp_path / "samples.jsonl")] == [2, 4]


def test_signal_in_the_preflight_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MIN_STEPS_ON_CPU", 1)
    training = training_on(tmp_path)
    raise_in(training, "micro_batches", 1)
    micro_batches = count_micro_batches(training)
    with pytest.raises(Interrupted, match="before step 1: nothing was lost"):
        fit(training)
    assert micro_batches == []


# Handlers


def test_second_ctrl_c_stops_at_once() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(StopRequested, match="SIGINT"):
            stop.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_second_sigterm_changes_nothing() -> None:
    with stop_on_signals() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.signal_name == "SIGUSR1"


def test_handlers_are_those_of_before_afterwards() -> None:
    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.getsignal(number) for number in watched]
    with terminable(), stop_on_signals():
        assert [signal.getsignal(number) for number in watched] != before
    assert [signal.getsignal(number) for number in watched] == before


def test_run_in_another_thread_has_no_handlers_and_works() -> None:
    from threading import Thread

    seen: list[StopFlag] = []

    def work() -> None:
        with terminable(), stop_on_signals() as stop:
            seen.append(stop)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert seen and seen[0].signal_name is None


def test_hangup_changes_nothing_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)  # or a terminal that runs this test would fall silent
    with terminable(), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal_name is None
        print("still here", file=sys.stderr)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [
        (signal.SIGINT, 130, "Stopped by Ctrl-C"),
        (signal.SIGTERM, 75, "Stopped by SIGTERM: nothing was lost"),
        (signal.SIGUSR1, 75, "Stopped by SIGUSR1: nothing was lost"),
    ],
)
def test_signal_outside_the_loop_is_a_sentence_and_an_exit_code(
    number: int, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        except Exception as error:
            raise AssertionError("a library would take the signal for its own error") from error

    monkeypatch.setitem(COMMANDS, "env", Command("x", (), work))
    assert main(["env"]) == code
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1
    assert not issubclass(Terminated, Exception)


# Processes


def wait_for(condition: Callable[[], bool], process: forks.Command, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def train_command(model: Path, pairs: Path, out: Path, *more: str) -> list[str]:
    options = {
        "--model_name_or_path": model, "--dataset": pairs, "--output_dir": out, "--max_steps": 5000,
        "--save_steps": 5000, "--gradient_accumulation_steps": 2, "--dtype": "float32", "--lora_r": 4,
    }  # fmt: skip
    return ["train", *(str(part) for pair in options.items() for part in pair), *more]


def hang_in(module: str, function: str) -> None:
    """Put in the place of a function one that says where it is and works on."""

    def slow(*_: Any, **__: Any) -> None:
        print("IN THE PHASE", flush=True)
        while True:
            time.sleep(0.01)

    setattr(import_module(module), function, slow)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
@pytest.mark.parametrize("function", ["load_training_data", "load_policy"])
def test_process_ends_with_a_sentence_while_it_loads(
    function: str, number: int, code: int, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    hang = partial(hang_in, "qlora_dpo.training.train", function)
    process = forks.Command(train_command(model_folder, pairs_file, out), log, before=hang)
    wait_for(lambda: "IN THE PHASE" in log.read_text(), process, log)
    process.send_signal(number)
    assert process.wait(10) == code, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said and "Stopped by" in said.splitlines()[-1]
    assert checkpoints(out) == [] and RunFolder(out).status()["status"] == "new"


@pytest.mark.slow
def test_second_ctrl_c_ends_the_process_at_once(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "run"
    arguments = train_command(model_folder, pairs_file, out, "--activation_checkpointing", "none")
    process = forks.Command(arguments, log, before=partial(hang_in, "qlora_dpo.training.engine", "pack"))
    wait_for(lambda: "IN THE PHASE" in log.read_text(), process, log)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C stops at once" in log.read_text(), process, log)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130 and "Traceback" not in log.read_text(), log.read_text()


@pytest.mark.slow
def test_run_outlives_its_terminal(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    leader, terminal = pty.openpty()
    arguments = train_command(model_folder, pairs_file, out, "--max_steps", "150")
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_dpo", *arguments], cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    deadline = time.monotonic() + 120
    while not read_metrics(out / "metrics.jsonl") and time.monotonic() < deadline:
        while __import__("select").select([leader], [], [], 0.05)[0]:
            os.read(leader, 65536)
    seen = len(read_metrics(out / "metrics.jsonl"))
    os.close(leader)  # as sshd does when the line drops: the kernel sends SIGHUP and every write fails
    assert process.wait(120) == 0
    assert 0 < seen < 150 == len(read_metrics(out / "metrics.jsonl"))
    assert (out / "adapter_model.safetensors").is_file()
