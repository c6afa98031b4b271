"""Commands that share a reference store: what one computed no other computes, and what is wrong is said first."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
from tiny import random_pairs, tiny_model, with_lora
from training.devices import FakeDevice
from training.runs import CPU

from qlora_dpo.cli import main
from qlora_dpo.data.packing import pack
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.models.scoring import choose_scorer
from qlora_dpo.reference.local import reference_score
from qlora_dpo.reference.store import ReferenceStore
from qlora_dpo.scoring.reference import LARGE, measured_budget
from qlora_dpo.training.records.tracking import read_metrics

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def say(model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the tiny model and the pairs; gives its exit code and what it said about the reference."""

    def run(command: str, *more: object, **changes: object) -> tuple[int, str]:
        options = {"model_name_or_path": model_folder, "dataset": pairs_file} | changes
        if command == "train":
            options = {"dtype": "float32", "max_steps": 2, "gradient_accumulation_steps": 4, "lora_r": 4} | options
            options = {"output_dir": tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"} | options
        named = [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]
        code = main([*command.split(), *map(str, more), *named])
        captured = capsys.readouterr()
        lines = [line for line in (captured.out + captured.err).splitlines() if "%|" not in line]
        return code, "\n".join(lines)

    return run


def cache() -> Path:
    return Path(os.environ["QLORA_DPO_CACHE"]) / "reference"


def last_run(tmp_path: Path) -> list[dict[str, Any]]:
    return read_metrics(sorted(tmp_path.glob("run-*"))[-1] / "metrics.jsonl")


@pytest.mark.slow
def test_other_runs_with_the_same_reference_compute_nothing(say: Any, tmp_path: Path) -> None:
    code, said = say("train", max_steps=None, num_train_epochs=1)
    assert code == 0 and "reference: 0 of 40 pairs are in" in said
    assert "reference: 40 pairs computed, 0 from the store" in said
    changes = {"learning_rate": 1e-3, "beta": 0.3, "lora_r": 8, "seed": 7, "loss_type": "ipo"}
    code, said = say("train", **changes)
    assert code == 0 and "reference: 40 of 40 pairs are in" in said
    assert "8 stored pairs computed again here differ by" in said
    assert "reference: 0 pairs computed, 10 from the store" in said
    first = last_run(tmp_path)[0]
    assert abs(first["rewards/chosen"]) < 1e-5 and abs(first["rewards/margins"]) < 1e-5
    code, said = say("train", reference_store="none", **changes)
    assert code == 0 and "reference:" not in said
    stored, inline = (read_metrics(tmp_path / run / "metrics.jsonl") for run in ("run-1", "run-2"))
    assert [row["loss"] for row in stored] == pytest.approx([row["loss"] for row in inline], abs=1e-5)
    code, said = say("train", bnb_4bit_quant_type="fp4")  # another reference
    assert code == 0 and "reference: 0 of 40 pairs" in said and len(list(cache().glob("*.sqlite"))) == 2


@pytest.mark.slow
def test_store_is_filled_ahead_in_parts_moved_and_read(say: Any, tmp_path: Path) -> None:
    parts = [tmp_path / f"{number}.sqlite" for number in (1, 2)]
    for number, part in enumerate(parts, 1):
        code, said = say("reference", dtype="float32", store=part, shard=f"{number}/2")
        assert code == 0 and "0 of part" in said
    merged, file = tmp_path / "merged.sqlite", tmp_path / "rows.parquet"
    for part in parts:
        assert main(["reference", "export", str(part), str(file)]) == 0
        assert main(["reference", "import", str(file), str(merged)]) == 0
    code, said = say("reference", dtype="float32", store=merged)
    assert code == 0 and "0 pairs computed, 40 were there" in said
    code, said = say("reference verify", merged, dtype="float32", verify=10)
    assert code == 0 and "all 80 rows are whole" in said and "40 of 40 pairs are there. 10 stored pairs" in said
    code, said = say("train", reference_store=merged)
    assert code == 0 and "reference: 0 pairs computed, 10 from the store" in said
    assert not list(cache().glob("*.sqlite"))


@pytest.mark.slow
def test_values_that_are_not_this_models_are_refused(say: Any, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    assert say("reference", dtype="float32", store=store)[0] == 0
    with ReferenceStore.open(store) as opened:
        (model,) = opened.models()
        rows = opened.of(model.identity)
        (everything,) = rows.batches(1000)
        rows.discard(list(everything))
        rows.put({key: values - np.float32(0.01) for key, values in everything.items()})
    code, said = say("train", reference_store=store)
    assert code == 65 and "are those of another model" in said and "0.0100 per token" in said
    assert last_run(tmp_path) == []
    code, said = say("reference verify", store, dtype="float32")
    assert code == 65 and "all 80 rows are whole" in said and "above --max_drift 0.0001" in said
    code, said = say("train", reference_store=store, max_drift=0.02)
    assert code == 0 and "reference: 0 pairs computed, 10 from" in said
    assert last_run(tmp_path)[0]["rewards/chosen"] > 1e-3  # the step checked itself against what is computed here


@pytest.mark.slow
def test_store_of_another_model_is_refused_unless_it_is_named(say: Any, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    assert say("reference", dtype="bfloat16", store=store)[0] == 0
    code, said = say("train", reference_store=store)
    assert code == 74 and "none of this run's reference" in said and "it differs in dtype, quantization" in said
    with ReferenceStore.open(store) as opened:
        (model,) = opened.models()
    code, said = say("train", reference_store=store, reference_source="nobody")
    assert code == 2 and "0 models" in said and model.identity.fingerprint[:16] in said
    code, said = say("train", reference_store=store, reference_source=model.identity.fingerprint[:8])
    assert code == 0 and "0 pairs computed, 10 from the store" in said
    assert "As the reference they begin the training with margins of" in said
    with ReferenceStore.open(store) as opened:
        rows = opened.of(model.identity)
        (some,) = list(rows.batches(1000))
        rows.discard(list(some)[:1])
    code, said = say("train", reference_store=store, reference_source=model.identity.fingerprint[:8])
    assert code == 65 and "lacks 1 pairs" in said


@pytest.mark.slow
def test_adapter_that_is_the_reference_has_rows_of_its_own(say: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "sft"
    adapter.mkdir()
    save_adapter(with_lora(tiny_model(), r=4), adapter)
    store = tmp_path / "store.sqlite"
    for more in ({}, {"reference_model": adapter}):
        assert say("reference", dtype="float32", store=store, **more)[0] == 0
    code, said = say("train", reference_store=store, reference_model=adapter, lora_r=None)
    assert code == 0 and "reference: 0 pairs computed, 10 from" in said
    assert abs(last_run(tmp_path)[0]["rewards/chosen"]) < 1e-5
    with ReferenceStore.open(store) as opened:
        assert [model.rows for model in opened.models()] == [80, 80]


@pytest.mark.slow
def test_named_store_that_cannot_be_used_is_an_error_and_the_default_one_a_warning(say: Any, tmp_path: Path) -> None:
    damaged = tmp_path / "store.sqlite"
    damaged.write_text("x" * 4096)
    code, said = say("train", reference_store=damaged)
    assert code == 74 and "is no reference store" in said and last_run(tmp_path) == []
    shutil.rmtree(cache(), ignore_errors=True)
    cache().write_text("")  # where the folder of stores should be
    code, said = say("train")
    assert code == 0 and said.count("warning: the reference store") == 1 and "keeps the reference in memory" in said
    assert "Traceback" not in said and len(last_run(tmp_path)) == 2


@pytest.mark.slow
def test_sft_opens_no_store(say: Any, tmp_path: Path, pairs_file: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    answers.write_text("".join(json.dumps({"prompt": row["prompt"], "response": row["chosen"]}) + "\n" for row in rows))
    code, said = say("train", objective="sft", dataset=answers)
    assert code == 0 and "reference:" not in said and not list(cache().glob("*.sqlite*"))


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("train", {"reference_store": "none", "reference_source": "x"}, "--reference_source x would be ignored"),
        ("train", {"reference_source": "x"}, "--reference_source x would be ignored"),
        ("train", {"max_drift": -1}, "--max_drift -1.0: must be above 0"),
        ("train", {"objective": "sft", "reference_store": "a"}, "--reference_store a would be ignored"),
        ("reference", {"dataset": None}, "reference needs --dataset"),
        ("reference", {"objective": "sft"}, "--objective sft has no reference"),
        ("reference", {"shard": "3/2"}, "--shard 3/2: write which part of how many"),
        ("reference", {"max_tokens_per_microbatch": 0}, "--max_tokens_per_microbatch 0: must be above 0"),
        ("reference verify", {"store": "a", "model_name_or_path": None, "dataset": None, "verify": 3}, "--verify"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)  # fmt: skip
def test_options_that_cannot_work_are_refused(command: str, changes: dict[str, Any], words: str, say: Any) -> None:
    code, said = say(command, **changes)
    assert code == 2 and words in said


@pytest.mark.slow
def test_killed_fill_loses_a_micro_batch_at_most(
    model_folder: Path, pairs_file: Path, tmp_path: Path, say: Any
) -> None:
    store = tmp_path / "store.sqlite"
    arguments = ["--model_name_or_path", model_folder, "--dataset", pairs_file, "--store", store, "--dtype", "float32"]
    process = forks.Command(["reference", *arguments, "--max_tokens_per_microbatch", "1"])
    deadline = time.monotonic() + 120
    while rows_in(store) < 6 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    kept = rows_in(store)
    assert kept >= 6 and kept % 2 == 0
    code, said = say("reference", dtype="float32", store=store)
    assert code == 0 and f"{40 - kept // 2} pairs computed, {kept // 2} were there" in said


def rows_in(store: Path) -> int:
    try:
        with sqlite3.connect(f"{store.as_uri()}?mode=ro", uri=True) as connection:
            return int(connection.execute("SELECT count(*) FROM logps").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        if "connection" in locals():
            connection.close()


@pytest.mark.parametrize(("capacity", "expected"), [(300_000, 2_650), (1e12, 16_384), (500, LARGE)])
def test_budget_is_measured_where_memory_can_be_read(capacity: float, expected: int) -> None:
    pairs = random_pairs([(4, 4, 4)] * 400)  # ten tokens each
    model = with_lora(tiny_model())
    device = FakeDevice(choose_scorer(model, pairs[0], CPU), capacity=capacity, fixed=5_000, per_token=100)
    plain = reference_score(model, device.inner)

    def score(batch: Any) -> Any:
        device.per_token_logps_and_squares(model, batch)
        return plain(batch)

    assert pack(pairs[:1], "shared").input_ids.numel() == 10
    assert measured_budget(score, pairs, "shared", CPU, device) == expected
