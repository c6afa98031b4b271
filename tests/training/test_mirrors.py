"""Trackers that raise, hang or are not there: the run takes the same time and writes the same record."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.errors import UsageError
from qlora_dpo.training.records import trackers
from qlora_dpo.training.records.mirrors import Limits, Mirror
from qlora_dpo.training.records.tracking import Recorder, read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 200
SECONDS_FOR_ALL_STEPS = 1.0
SHORT = Limits(call_seconds=0.3, finish_seconds=0.5)

woken = threading.Event()


@pytest.fixture(autouse=True)
def wake_what_hangs() -> Iterator[None]:
    woken.clear()
    yield
    woken.set()


def hang(*_arguments: object) -> None:
    woken.wait(60)


def fail(*_arguments: object) -> None:
    raise ConnectionError("no route")


def leave(*_arguments: object) -> None:
    raise SystemExit(3)


class Told:
    """A tracker that remembers what it was told, and does `at[name]` in the call of that name."""

    def __init__(self, **at: Callable[..., None]) -> None:
        self.at = at
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.samples: list[tuple[int, list[dict[str, Any]]]] = []
        self.is_finished = False

    def start(self) -> Told:
        self.at.get("start", lambda: None)()
        return self

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))
        self.at.get("log", lambda *_: None)(step)

    def show_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        self.samples.append((step, samples))

    def finish(self) -> None:
        self.at.get("finish", lambda: None)()
        self.is_finished = True


def record(file: Path, mirrors: list[Mirror]) -> tuple[float, float]:
    """Seconds that the steps took, and that finishing took."""
    recorder = Recorder(file, mirrors)
    started = time.monotonic()
    for step in range(1, STEPS + 1):
        recorder.log(step, {"loss": 1 / step})
    stepped = time.monotonic()
    recorder.finish()
    return stepped - started, time.monotonic() - stepped


@pytest.mark.parametrize("call", ["start", "log", "finish"])
@pytest.mark.parametrize(("trouble", "words"), [(hang, "seconds"), (fail, "no route"), (leave, "failed (3)")])
def test_whatever_a_tracker_does_the_run_takes_the_same_time_and_writes_the_same_record(
    call: str, trouble: Callable[..., None], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path / "alone.jsonl", [])
    tracker = Told(**{call: trouble})
    stepping, finishing = record(tmp_path / "metrics.jsonl", [Mirror("odd", tracker.start, SHORT)])
    assert stepping < SECONDS_FOR_ALL_STEPS
    assert finishing < SHORT.finish_seconds + 0.5
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert [record.getMessage() for record in caplog.records if "odd" in record.getMessage()] == [
        record.getMessage() for record in caplog.records if words in record.getMessage()
    ]
    assert len(caplog.records) == 1 and not tracker.is_finished


def test_healthy_tracker_gets_every_line_in_order_and_is_closed(tmp_path: Path) -> None:
    slow_start = Told(start=lambda: time.sleep(0.2))
    record(tmp_path / "metrics.jsonl", [Mirror("healthy", slow_start.start)])
    assert slow_start.lines == [
        (row["step"], {"loss": row["loss"]}) for row in read_metrics(tmp_path / "metrics.jsonl")
    ]
    assert len(slow_start.lines) == STEPS and slow_start.is_finished


def test_tracker_that_hangs_is_given_up_during_the_run(caplog: pytest.LogCaptureFixture) -> None:
    released: list[bool] = []
    mirror = Mirror("stuck", Told(log=hang).start, SHORT, lambda: released.append(True))
    mirror.log(1, {})
    time.sleep(SHORT.call_seconds + 0.2)
    assert not released  # nothing asks about it but the next line
    mirror.log(2, {})
    mirror.log(3, {})
    assert released == [True]
    assert [record.getMessage() for record in caplog.records] == [
        "stuck has not answered for 0.3 seconds and is no longer told; metrics.jsonl has it all."
    ]


def test_tracker_slower_than_the_run_misses_lines_and_still_closes(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Told(log=lambda step: time.sleep(0.01))
    mirror = Mirror("slow", tracker.start, Limits(waiting_lines=5))
    for step in range(50):
        mirror.log(step, {})
    mirror.close()
    mirror.wait(5)
    assert tracker.is_finished and 5 <= len(tracker.lines) < 50
    assert [step for step, _ in tracker.lines][:5] == [0, 1, 2, 3, 4]
    assert len(caplog.records) == 1 and "slow is slower than the run" in caplog.text


def test_line_is_what_it_was_when_it_was_logged() -> None:
    tracker, metrics = Told(start=lambda: time.sleep(0.1)), {"loss": 1.0}
    mirror = Mirror("late", tracker.start)
    mirror.log(1, metrics)
    metrics["loss"] = 2.0
    mirror.close()
    mirror.wait(5)
    assert tracker.lines == [(1, {"loss": 1.0})]


def test_trackers_that_hang_share_the_time_to_close(tmp_path: Path) -> None:
    mirrors = [Mirror(f"stuck {number}", Told(finish=hang).start, SHORT) for number in range(4)]
    assert record(tmp_path / "metrics.jsonl", mirrors)[1] < SHORT.finish_seconds + 0.5


def test_secret_in_a_trackers_error_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-7f3a9")

    def refuse() -> None:
        raise ConnectionError("401 for https://me:pass-1@host/ with key canary-7f3a9")

    record(tmp_path / "metrics.jsonl", [Mirror("rude", Told(start=refuse).start)])
    assert "401 for https://***@host/ with key ***" in caplog.text


def test_tracker_that_is_not_installed_is_refused_before_any_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setitem(trackers.TRACKERS, "ours", trackers.Kind("json", lambda *_: started.append(True)))  # type: ignore
    monkeypatch.setitem(trackers.TRACKERS, "absent", trackers.Kind("no_such_package", trackers.WandbTracker))
    with pytest.raises(UsageError, match=r"--report_to absent needs a package .*no_such_package.*pip install absent"):
        trackers.start_trackers(["ours", "absent"], tmp_path, "run", {})
    assert not started
    assert trackers.start_trackers(["none"], tmp_path, "run", {}) == []


SCRIPT = """
import os, sys, time
from pathlib import Path
from typing import Any
from qlora_dpo.training.records.trackers import start_trackers
from qlora_dpo.training.records.tracking import Recorder
folder = Path(sys.argv[1])
import wandb
started = time.monotonic()
recorder = Recorder(folder / "metrics.jsonl", start_trackers(["wandb"], folder, "run", {"beta": 0.1}, run_id="a1b2c3"))
print("started", time.monotonic() - started, flush=True)
%s
started = time.monotonic()
for step in range(1, 201): recorder.log(step, {"loss": 1 / step})
print("logged", time.monotonic() - started, flush=True)
started = time.monotonic()
recorder.finish()
print("finished", time.monotonic() - started, flush=True)
"""
TO_SERVICE = """
from wandb.sdk import wandb_setup
import signal
while wandb.run is None: time.sleep(0.05)
pid = wandb_setup._singleton._connection._proc._process.pid
os.kill(pid, signal.%s)
print("service", pid, flush=True)
"""


def run_script(folder: Path, meanwhile: str, **environment: str) -> tuple[dict[str, float], float, str]:
    """Seconds by what took them, seconds of the whole process after finishing, stderr."""
    environment = os.environ | {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | environment
    environment.pop("WANDB_SERVICE", None)  # of a wandb that another test started in this process
    command = [sys.executable, "-c", SCRIPT % meanwhile, str(folder)]
    # Files, not pipes: a service that outlives its process would keep those open
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        done = subprocess.run(command, env=environment, cwd=folder, stdout=out, stderr=err, timeout=90, check=False)
    ended, stderr = time.time(), (folder / "err").read_text()
    assert done.returncode == 0 and "Traceback" not in stderr, stderr
    words = [line.split() for line in (folder / "out").read_text().splitlines()]
    times = {line[0]: float(line[1]) for line in words if line[0] in {"started", "service", "logged", "finished"}}
    return times, ended - (folder / "metrics.jsonl").stat().st_mtime, stderr


def check_times(times: dict[str, float], since_last_line: float) -> None:
    assert times["started"] < 1 and times["logged"] < SECONDS_FOR_ALL_STEPS
    assert times["finished"] < Limits().finish_seconds + 1
    assert since_last_line < Limits().finish_seconds + 4  # with the end of the interpreter


@pytest.mark.slow
def test_wandb_whose_server_never_answers_delays_neither_the_run_nor_its_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        times, rest, stderr = run_script(
            tmp_path, "", WANDB_MODE="online", WANDB_BASE_URL=address, WANDB_API_KEY="0123456789abcdef" * 2 + "01234567"
        )
    check_times(times, rest)
    assert "wandb has not closed within 8 seconds and is no longer told; metrics.jsonl has it all." in stderr
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("SIGSTOP", "has not closed within 8 seconds"), ("SIGKILL", "failed (")])
def test_wandb_whose_service_hangs_or_dies_does_not_keep_the_process_from_ending(
    name: str, words: str, tmp_path: Path
) -> None:
    service = None
    try:
        times, rest, stderr = run_script(tmp_path, TO_SERVICE % name, WANDB_MODE="offline")
        service = int(times.pop("service"))
        check_times(times, rest)
        assert f"wandb {words}" in stderr and stderr.count("is no longer told") == 1
    finally:
        if service is not None and name == "SIGSTOP":
            os.kill(service, signal.SIGKILL)


@pytest.mark.slow
def test_wandb_run_keeps_its_id_over_two_processes(tmp_path: Path) -> None:
    for _ in range(2):
        times, rest, stderr = run_script(tmp_path, "", WANDB_MODE="offline")
        check_times(times, rest)
        assert "no longer told" not in stderr
        time.sleep(1)  # wandb names the folder of an offline run by the second
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith("-a1b2c3") for run in runs)
    assert all(list(run.glob("*.wandb")) for run in runs)


SAMPLES = [{"step": 4, "prompt": f"p{number}", "before": "no", "after": "<b>yes</b>"} for number in range(2)]


def test_trackers_get_the_samples_of_an_evaluation(tmp_path: Path) -> None:
    told = Told()
    recorder = Recorder(tmp_path / "metrics.jsonl", [Mirror("told", told.start)])
    recorder.log(4, {"loss": 0.5})
    recorder.show_samples(4, SAMPLES)
    recorder.finish()
    assert (told.lines, told.samples) == ([(4, {"loss": 0.5})], [(4, SAMPLES)])


@pytest.mark.slow
def test_samples_are_a_table_in_wandb_and_texts_in_tensorboard(tmp_path: Path) -> None:
    code = (
        "import json, sys; from pathlib import Path\n"
        "from qlora_dpo.training.records.trackers import start_trackers\n"
        "from qlora_dpo.training.records.tracking import Recorder\n"
        "folder = Path(sys.argv[1])\n"
        "mirrors = start_trackers(['wandb', 'tensorboard'], folder, 'run', {})\n"
        "recorder = Recorder(folder / 'metrics.jsonl', mirrors)\n"
        "recorder.log(4, {'loss': 0.5}); recorder.show_samples(4, json.loads(sys.argv[2])); recorder.finish()"
    )
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    environment.pop("WANDB_SERVICE", None)
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(SAMPLES)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "no longer told" not in done.stderr, done.stderr
    (table,) = tmp_path.glob("wandb/**/media/table/samples*.json")
    written = json.loads(table.read_text())
    assert written["columns"] == ["step", "prompt", "before", "after"]
    assert written["data"] == [[4, "p0", "no", "<b>yes</b>"], [4, "p1", "no", "<b>yes</b>"]]
    (events,) = tmp_path.glob("tensorboard/events*")
    assert b"after: <b>yes</b>" in events.read_bytes()
