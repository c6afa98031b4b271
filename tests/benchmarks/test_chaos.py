"""The chaos suite: what it counts is right, its reduced form passes, and each row fails when its promise is broken."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.chaos import kills
from benchmarks.chaos.__main__ import REDUCED, ROWS, Counts, completed, main, parse_arguments, table
from benchmarks.chaos.bench import Bench, Row
from benchmarks.chaos.breakages import BREAKAGES
from benchmarks.chaos.fuzzing import KINDS, mutated
from benchmarks.chaos.signals import Stop
from benchmarks.chaos.watching import Crash, Trace, read_trace
from benchmarks.chaos.workload import Outcome, adapter_digest

ROOT = Path(__file__).resolve().parents[2]
# The row that must fail, and where the reduced form's few trials could miss the breakage, enough of them.
BROKEN_BY = {
    "no-verification": ("corruption", REDUCED),
    "no-random-states": ("kill", replace(REDUCED, kills=9)),
    "saves-in-place": ("crash_points", replace(REDUCED, crash_points=3)),
    "deaf": ("signals", REDUCED),
    "dies-without-room": ("full_disk", REDUCED),
    "trusts-rows": ("fuzz", REDUCED),
    "no-guard": ("pages", REDUCED),
    "writes-anywhere": ("foreign", REDUCED),
}


def test_a_row_passes_when_every_trial_does_and_a_control_when_one_does_not() -> None:
    row, control = Row("a", ""), Row("b", "", needs_failures=True)
    assert row.verdict == control.verdict == "FAILED"  # nothing was tried
    for each in (row, control):
        each.add([], "first")
    assert (row.verdict, control.verdict) == ("passed", "FAILED")
    for each in (row, control):
        each.add(["wrong"], "second")
    assert (row.verdict, control.verdict) == ("FAILED", "passed")
    assert row.failures == ["second: wrong"]


def test_digest_is_of_tensors_and_not_of_their_order(tmp_path: Path) -> None:
    one, two = torch.arange(6.0), torch.ones(2, 3)
    save_file({"x": one, "y": two}, tmp_path / "a", metadata={"format": "pt"})
    save_file({"y": two, "x": one}, tmp_path / "b")
    save_file({"x": one, "y": two.T.contiguous()}, tmp_path / "c")
    one[3] = torch.nextafter(one[3], torch.tensor(9.0))
    save_file({"x": one, "y": two}, tmp_path / "d")
    digests = [adapter_digest(tmp_path / name) for name in "abcd"]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_outcomes_differ_by_a_bit_a_step_or_a_number() -> None:
    expected = Outcome("a", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    assert expected.differences(expected) == []
    assert Outcome("b", expected.record).differences(expected) == ["the adapter is not bit-identical"]
    assert Outcome("a", expected.record[:1]).differences(expected) == ["metrics.jsonl has the steps [1]"]
    twice = Outcome("a", [*expected.record, expected.record[-1]])
    assert twice.differences(expected) == ["metrics.jsonl has the steps [1, 2, 2]"]
    other = Outcome("a", [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.2500001}])
    assert other.differences(expected) == ["step 2 differs in loss"]


def in_a_fork(prepare: Callable[[], None], act: Callable[[], None]) -> int:
    """The exit status of a child that watches itself."""
    pid = os.fork()
    if pid == 0:
        prepare()
        act()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_every_change_of_the_folder_is_seen_and_can_be_the_last(tmp_path: Path) -> None:
    import shutil

    folder, names = tmp_path / "run", ["a", "b"]

    def act() -> None:
        folder.mkdir()
        (folder / "staging").mkdir()
        for name in names:
            (folder / "staging" / name).write_text(name)
        (folder / "staging" / "a").read_text()  # changes nothing
        (folder / "staging").rename(folder / "final")
        (tmp_path / "elsewhere").write_text("")
        shutil.rmtree(folder / "final")

    assert in_a_fork(Trace(folder, tmp_path / "trace"), act) == 0
    events = read_trace(tmp_path / "trace")
    assert [(event.name, event.path) for event in events[:4]] == [
        ("os.mkdir", "staging"), ("open", "staging/a"), ("open", "staging/b"), ("os.rename", "final"),
    ]  # fmt: skip
    assert [event.name for event in events[4:]] == ["shutil.rmtree", "os.remove", "os.remove", "os.rmdir"]
    assert {event.path for event in events[4:]} == {"final", "final/a", "final/b"}

    shutil.rmtree(folder)
    assert in_a_fork(Crash(folder, 3), act) == -9
    assert [path.name for path in (folder / "staging").iterdir()] == ["a"]
    shutil.rmtree(folder)
    assert in_a_fork(Crash(folder, 3, torn=True), act) == -9
    assert (folder / "staging" / "b").read_bytes().startswith(b'{"step"')


STOPPED = Stop(signal.SIGTERM, 0.5, 75, "", had_begun=True, had_finished=False, steps=3)
WRITTEN = "error: SIGTERM at step 4: checkpoint-3 is written; the same command continues."
CTRL_C = "Stopped by Ctrl-C; the same command starts again where it can."


@pytest.mark.parametrize(
    ("stop", "problems"),
    [
        (replace(STOPPED, said=WRITTEN), 0),
        (replace(STOPPED, said="Stopped by SIGTERM: nothing was lost; the same command starts again."), 0),
        (replace(STOPPED, code=0, steps=11), 0),
        (replace(STOPPED, code=0, steps=10), 1),  # it heard nothing
        (replace(STOPPED, said="error: SIGTERM"), 1),
        (replace(STOPPED, said=WRITTEN, seconds=2.5), 1),
        (replace(STOPPED, code=-15), 1),
        (replace(STOPPED, code=-15, had_begun=False), 0),
        (replace(STOPPED, code=-15, had_finished=True), 0),
        (replace(STOPPED, code=130, said=CTRL_C), 1),
        (replace(STOPPED, code=130, said=CTRL_C, signal=signal.SIGINT), 0),
        (replace(STOPPED, code=1, seconds=2.5, said="Traceback (most recent call last):\n"), 3),
    ],
)
def test_what_a_stop_promises(stop: Stop, problems: int) -> None:
    assert len(stop.broken()) == problems, stop.broken()


def test_mutations_repeat_with_their_seed_and_differ_without() -> None:
    for kind in KINDS:
        contents = [mutated(kind, random.Random(number)) for number in range(20)]
        assert contents == [mutated(kind, random.Random(number)) for number in range(20)]
        assert len(set(contents)) > 15


def test_measured_results_are_replaced_by_whole_runs_only() -> None:
    assert parse_arguments([]).output is not None
    assert parse_arguments(["--chaos", "200"]).counts == replace(Counts(), kills=200, signals=400)
    assert parse_arguments(["--chaos", "7", "--reduced"]).counts.crash_points == 7
    for less in (["--reduced"], ["--only", "fuzz"], ["--chaos", "3"], ["--break", "deaf"]):
        assert parse_arguments(less).output is None


def test_rows_that_are_run_again_replace_their_own_in_the_results_of_a_run_like_it(tmp_path: Path) -> None:
    like = {"seed": 0, "counts": {"kills": 50}, "broken": None, "environment": {"cores": 2}, "seconds": 60}
    earlier = like | {"rows": [{"name": "kill", "passed": 1}, {"name": "signals", "passed": 2}]}
    again = like | {"rows": [{"name": "signals", "passed": 3}], "seconds": 30}
    assert completed(again, tmp_path / "none.json") == again
    (tmp_path / "chaos.json").write_text(json.dumps(earlier))
    merged = completed(again, tmp_path / "chaos.json")
    assert merged["rows"] == [{"name": "kill", "passed": 1}, {"name": "signals", "passed": 3}]
    assert merged["seconds"] == 90
    more = again | {"rows": [{"name": "fuzz", "passed": 4}]}
    assert [row["name"] for row in completed(more, tmp_path / "chaos.json")["rows"]] == ["kill", "signals", "fuzz"]
    assert completed(again | {"seed": 1}, tmp_path / "chaos.json")["rows"] == again["rows"]
    assert completed(again | {"counts": {"kills": 3}}, tmp_path / "chaos.json")["rows"] == again["rows"]


def test_every_row_is_broken_by_something() -> None:
    assert BROKEN_BY.keys() == BREAKAGES.keys()
    assert {row for row, _ in BROKEN_BY.values()} == ROWS.keys() - {"control"}


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets these for the runs that it starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("own_environment")
def test_reduced_form_keeps_every_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--reduced", "--seed", "1", "--output", str(tmp_path)])
    said = capsys.readouterr().err
    results: dict[str, Any] = json.loads((tmp_path / "chaos.json").read_text())
    assert {row["verdict"] for row in results["rows"]} <= {"passed", "not possible here"}, said
    assert code == 0
    assert (tmp_path / "chaos.md").read_text() == table(results)
    assert "seed 1" in said


class PromiseBroken(Exception):
    """A trial found it; no other needs to."""


def within_checkpoints(points: Sequence[Any], count: int, _: random.Random) -> list[Any]:
    """Crash points in checkpoints under their own names, where a sound tool has few."""
    return [point for point in points if point[0].path.startswith("checkpoint-")][:count]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A workload whose unbroken outcome is known; what is broken on purpose is set by each test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TQDM_DISABLE", "1")
        bench = Bench.make(tmp_path_factory.mktemp("chaos"), 0, "deaf")
        bench.measure(spawned=False)
        yield bench


@pytest.mark.slow
@pytest.mark.parametrize("breakage", sorted(BROKEN_BY.keys() - {"trusts-rows"}))
def test_row_finds_its_broken_promise(breakage: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(row: Row, problems: Sequence[str], trial: str) -> None:
        if problems:
            raise PromiseBroken(f"{row.name}, {trial}: {problems}")

    monkeypatch.setattr(Row, "add", add)
    monkeypatch.setattr(kills, "spread", within_checkpoints)
    row, counts = BROKEN_BY[breakage]
    bench.breakage = breakage
    with pytest.raises(PromiseBroken):
        ROWS[row](bench, counts)


@pytest.mark.slow
@pytest.mark.usefixtures("own_environment")
def test_command_fails_when_a_promise_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reduced", "--only", "fuzz", "--break", "trusts-rows"]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and "broken on purpose: trusts-rows" in said


def test_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "kills"])
    assert "invalid choice" in capsys.readouterr().err
