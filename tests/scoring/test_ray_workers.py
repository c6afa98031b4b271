"""`--engine ray`: workers of a cluster fill a store as one process does; what goes wrong there is said here."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import forks
import numpy as np
import psutil
import pyarrow as pa
import pytest
from openai_server import OpenAIServer
from openai_server import made_up as made_up_logps
from scoring import ray_ways
from tiny import IdPair, random_pairs, tiny_model, with_lora

from qlora_dpo.cli import main
from qlora_dpo.config.reference import RayOptions
from qlora_dpo.errors import DataError, ModelError, ResourceError, StorageError
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.reference.fill import keys_of
from qlora_dpo.reference.store import Logps, ReferenceStore
from qlora_dpo.scoring import ray_cluster
from qlora_dpo.scoring.ray_cluster import Workers, ray_workers
from qlora_dpo.scoring.ray_workers import RayWay, Worker

ROOT = Path(__file__).resolve().parents[2]
NEEDS_RAY = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray is not installed")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two CPUs and a GPU that is none, which this process is connected to; its address."""
    changes = {
        "QLORA_DPO_CACHE": str(tmp_path_factory.mktemp("cache")),  # of the workers
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),  # Ray would write one to ~/.ray
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_BACKEND_LOG_LEVEL": "fatal",
    }  # fmt: skip
    own = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setenv(name, value)
        import ray

        context = ray.init(
            "local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100_000_000,
            log_to_driver=False, logging_level="CRITICAL",
        )  # fmt: skip
        signal.signal(signal.SIGTERM, own)
        yield context.address_info["gcs_address"]
        ray.shutdown()


def compute(make_way: Any, pairs: list[IdPair], found: dict[bytes, Logps], **options: Any) -> None:
    """Put what two workers make of pairs into `found`."""
    with ray_workers(RayOptions("ray", ray_workers=2), **({"use_gpu": False} | options)) as workers:
        RayWay(make_way, pairs, ray_ways.made_up(), workers)(range(len(pairs)), found.update)


def made_pairs(count: int, first: dict[int, int]) -> list[IdPair]:
    """Pairs of which some begin with these tokens."""
    pairs = random_pairs([(3, 2, 2)] * count)
    for place, pair in enumerate(pairs):
        pair.prompt_ids[0] = first.get(place, 3)
    return pairs


@contextmanager
def stopped_midway(words: list[str], store: Path, kept: int, number: int, address: str) -> Iterator[tuple[int, str]]:
    """A process of the command that gets a signal as soon as it has kept something; its exit code and what it said."""
    errors = store.with_suffix(f".{number}.err")
    process = forks.Command(words, errors, env={"RAY_ADDRESS": address})
    try:
        deadline = time.monotonic() + 240
        while rows_kept(store) <= kept:
            assert process.poll() is None and time.monotonic() < deadline, errors.read_text()
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    left = psutil.wait_procs(started, timeout=20)[1]
    assert process.returncode is not None
    yield process.returncode, errors.read_text()
    assert not left


def rows_kept(store: Path) -> int:
    try:
        return len(rows_in(store))
    except StorageError:
        return 0


def pair_row(pair: IdPair) -> dict[str, Any]:
    return {name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids", "origin")}


def all_keys(pairs: list[IdPair]) -> set[bytes]:
    return {key for pair in pairs for key in keys_of(pair)}


def rows_in(store: Path) -> dict[tuple[str, bytes], Logps]:
    with ReferenceStore.open(store, read_only=True) as opened:
        models = [model.identity for model in opened.models()]
        return {
            (model.fingerprint, key): values
            for model in models for batch in opened.of(model).batches(1000) for key, values in batch.items()
        }  # fmt: skip


def arguments(model: Path, pairs: Path, store: Path, *more: str) -> list[str]:
    return [
        "reference", "--model_name_or_path", str(model), "--dataset", str(pairs), "--store", str(store),
        "--load_in_4bit", "false", "--dtype", "float32", "--use_cpu", "--lint", "off", *more,
    ]  # fmt: skip


@NEEDS_RAY
@pytest.mark.slow
def test_two_workers_fill_a_shard_with_the_values_of_one_process(
    cluster: str, model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, shared = tmp_path / "alone.sqlite", tmp_path / "shared.sqlite"
    assert main(arguments(model_folder, pairs_file, alone)) == 0
    ray = ("--engine", "ray", "--ray_workers", "2")
    capsys.readouterr()
    assert main(arguments(model_folder, pairs_file, shared, *ray, "--shard", "1/2")) == 0
    told = capsys.readouterr()
    assert "Ray: 2 workers with 1 CPU each on 1 node" in told.err
    assert ", 0 of part 1/2 were there" in told.out
    expected, found = rows_in(alone), rows_in(shared)
    assert 20 < len(found) < 60 and found.keys() <= expected.keys()
    # Other micro-batches than those of one process round otherwise, in the last bits.
    assert all(np.allclose(values, expected[key], atol=1e-6, rtol=0) for key, values in found.items())
    assert main(arguments(model_folder, pairs_file, shared)) == 0
    assert f"{40 - len(found) // 2} pairs computed, {len(found) // 2} were there" in capsys.readouterr().out
    assert rows_in(shared).keys() == expected.keys()
    assert main(arguments(model_folder, pairs_file, shared, *ray)) == 0  # starts no worker
    assert "0 pairs computed, 40 were there" in capsys.readouterr().out


@NEEDS_RAY
@pytest.mark.slow
def test_neither_killed_workers_nor_a_refused_row_lose_a_pair(cluster: str, tmp_path: Path) -> None:
    pairs = made_pairs(60, {30: ray_ways.DEADLY, 3: ray_ways.REFUSED, 50: ray_ways.REFUSED})
    found: dict[bytes, Logps] = {}
    with pytest.raises(DataError, match=r"1 answers have no log-probs\n1 more parts"):
        compute(partial(ray_ways.dying_and_refusing, tmp_path), pairs, found)
    assert found.keys() == all_keys([pair for pair in pairs if pair.prompt_ids[0] != ray_ways.REFUSED])
    killed = int((tmp_path / "working").read_text())
    assert killed not in {int(-found[key][0]) for key in keys_of(pairs[30])} and (tmp_path / "loading").exists()


@NEEDS_RAY
@pytest.mark.slow
def test_worker_with_another_model_is_one_sentence_that_names_its_node(
    cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=r"^on the node .+ \(\d+\.\d+\.\d+\.\d+\): its model is not the one") as raised:
        compute(partial(ray_ways.differing, tmp_path), made_pairs(60, {}), {})
    assert "it differs in weights" in str(raised.value) and "Give every node the same files" in str(raised.value)
    assert capfd.readouterr().err == "Ray: 2 workers with 1 CPU each on 1 node\n"


@NEEDS_RAY
@pytest.mark.slow
def test_worker_may_hold_a_gpu_and_one_that_finds_no_room_does_not_hinder_it(
    cluster: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = made_pairs(20, {})
    found: dict[bytes, Logps] = {}
    compute(ray_ways.telling_pids, pairs, found, use_gpu=True)
    assert found.keys() == all_keys(pairs) and len({int(values[0]) for values in found.values()}) == 1
    assert capfd.readouterr().err == "Ray: 2 workers with 1 GPU each on 1 node\n"


@NEEDS_RAY
def test_model_that_cannot_be_loaded_is_told_with_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # of this process
    pairs = made_pairs(4, {})
    worker = Worker(ray_ways.unloadable, pairs, ray_ways.made_up(), Workers(1, 1, 0))
    for _ in range(2):
        (row,) = worker(pa.Table.from_pylist([pair_row(pair) for pair in pairs])).to_pylist()
        assert row["problem"] == "ModelError" and row["key"] is None
        assert "the model cannot be loaded: no such layer." in row["words"]


@NEEDS_RAY
@pytest.mark.slow
def test_driver_that_is_stopped_or_killed_loses_what_is_in_flight(
    cluster: str, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store.sqlite"
    with OpenAIServer(logps=made_up_logps) as server:
        served = ("--endpoint", server.url, "--endpoint_model", "m", "--verify", "0", "--concurrency", "2")
        words = arguments(model_folder, pairs_file, store, *served, "--engine", "ray")
        kept = rows_kept(store)
        # The first has no cluster: it starts one, and ends it.
        for address, number, code in (("local", signal.SIGTERM, 75), (cluster, signal.SIGKILL, -9)):
            answered = len(server.requests) + 25  # those of the first part
            server.delay = partial(lambda answered: 0.0 if len(server.requests) < answered else 3.0, answered)
            with stopped_midway(words, store, kept, number, address) as (returned, told):
                assert returned == code, told
                assert "Traceback" not in told and ("\nStopped by " in told) == (code > 0)
                assert ("one was started on this machine" in told) == (address == "local")
            kept = rows_kept(store)
        assert kept < 80
        server.delay, asked = 0.0, len(server.requests)
        assert main(words) == 0
        assert rows_kept(store) == 80
        assert len(server.requests) - asked <= 80 - kept + 4  # of the worker of the killed driver, which ends after it


@NEEDS_RAY
@pytest.mark.slow
def test_score_by_workers_gives_the_scores_of_one_process(
    cluster: str, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(with_lora(tiny_model(), r=4), adapter)
    scores = {}
    assert main(arguments(model_folder, pairs_file, tmp_path / "ray.sqlite")) == 0  # so that only the policy is missing
    for engine in ("local", "ray"):
        output, store = tmp_path / f"{engine}.jsonl", tmp_path / f"{engine}.sqlite"
        words = arguments(model_folder, pairs_file, store, "--adapter", str(adapter), "--output", str(output))
        assert main(["score", *(word for word in words[1:] if word not in {"--lint", "off"}), "--engine", engine]) == 0
        scores[engine] = [json.loads(line) for line in output.read_text().splitlines()]
    numbers = [name for name, value in scores["local"][0].items() if isinstance(value, float)]
    assert len(scores["ray"]) == 40 and "margin" in numbers
    for one, other in zip(scores["local"], scores["ray"], strict=True):
        assert [other[name] for name in numbers] == pytest.approx([one[name] for name in numbers], abs=1e-5)
    assert rows_in(tmp_path / "local.sqlite").keys() == rows_in(tmp_path / "ray.sqlite").keys()


def test_cluster_that_does_not_answer_is_an_error_at_once() -> None:
    pytest.importorskip("ray")
    with pytest.raises(ResourceError, match=r"the Ray cluster at 127.0.0.1:1 cannot be used: .*refused"):
        ray_cluster._connect("127.0.0.1:1")


@pytest.mark.parametrize(
    ("nodes", "asked", "options", "expected"),
    [
        ([{"CPU": 2}], None, {}, "1 worker with 2 CPUs"),
        ([{"CPU": 2}], 2, {}, "2 workers with 1 CPU each"),
        ([{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 2}, {"CPU": 4}], 0, {"use_gpu": True}, "6 workers with 1 GPU each"),
        ([{"CPU": 16, "GPU": 4}], 2, {"use_gpu": True}, "2 workers with 1 GPU each"),
        ([{"CPU": 16, "GPU": 4}], None, {}, "1 worker with 16 CPUs"),
        ([{"CPU": 4}, {"CPU": 12}], 2, {}, "2 workers with 6 CPUs each"),
        ([{"CPU": 4}, {"CPU": 12}, {}], None, {}, "2 workers with 6 CPUs each"),
        ([{"CPU": 2}], 5, {}, "5 workers with 1 CPU each"),
        ([{"CPU": 16, "GPU": 4}, {"CPU": 16}], None, {"has_model": False}, "2 workers with 1 CPU each"),
    ],
)  # fmt: skip
def test_cluster_is_divided_among_workers(
    nodes: list[dict[str, float]], asked: int | None, options: dict[str, bool], expected: str
) -> None:
    described = [{"Alive": True, "Resources": resources} for resources in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    workers = Workers.of([*described, dead], asked or None, **({"use_gpu": False, "has_model": True} | options))
    assert str(workers) == expected


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [(["--ray_workers", "2"], 2, "--ray_workers 2 would be ignored: --engine local has no workers"),
     (["--ray_address", "a:1"], 2, "--ray_address a:1 would be ignored"),
     (["--engine", "ray", "--ray_workers", "0"], 2, "--ray_workers 0: must be above 0"),
     (["--engine", "ray", "--ray_address", "ray://a:1"], 2, "the command itself runs in the cluster")],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    more: list[str], code: int, named: str, model_folder: Path, pairs_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(arguments(model_folder, pairs_file, tmp_path / "store.sqlite", *more)) == code
    assert named in capsys.readouterr().err


def test_missing_package_is_asked_for(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(arguments(model_folder, pairs_file, tmp_path / "store.sqlite", "--engine", "ray")) == 2
    assert "pip install 'ray[data]'" in capsys.readouterr().err
