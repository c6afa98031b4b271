"""`reference --endpoint`: a store filled by servers, with a sample computed here, and what a run makes of it."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch
from openai_server import OpenAIServer, made_up
from tiny import tiny_model, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.reference.fill import keys_of
from qlora_dpo.reference.store import ReferenceStore
from qlora_dpo.training.records.tracking import read_metrics
from qlora_dpo.training.referencing import Recomputed

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ("--load_in_4bit", "false", "--dtype", "float32")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same retries, without waiting for them."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("qlora_dpo.endpoint._LONGEST_PAUSE", 0.02)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def logps_of(seed: int) -> Callable[[Sequence[int]], list[float]]:
    """What a tiny model gives each token; the first has nothing before it."""
    model = tiny_model(seed=seed).eval()

    def logps(ids: Sequence[int]) -> list[float]:
        with torch.no_grad():
            every = model(torch.tensor([list(ids)])).logits[0].log_softmax(-1)
        return [0.0, *every[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()]

    return logps


@pytest.fixture(scope="module")
def same_model() -> Callable[[Sequence[int]], list[float]]:
    return logps_of(0)


@pytest.fixture
def server(same_model: Callable[[Sequence[int]], list[float]]) -> Iterator[OpenAIServer]:
    """Serves the model that is trained."""
    with OpenAIServer(logps=same_model) as served:
        yield served


def arguments(model: Path, pairs: Path | str, store: Path, server: OpenAIServer, *more: str) -> list[str]:
    return [
        "reference", "--model_name_or_path", str(model), "--dataset", str(pairs), "--use_cpu", "--lint", "off",
        "--endpoint", server.url, "--endpoint_model", "m", "--store", str(store), "--retries", "1", *more,
    ]  # fmt: skip


def rows_in(store: Path) -> int:
    with ReferenceStore.open(store, read_only=True) as opened:
        return sum(model.rows for model in opened.models())


def completions_of(file: Path) -> int:
    return len(
        {key for pair in load_preference_dataset(str(file), tokenizer=tiny_tokenizer()) for key in keys_of(pair)}
    )


@pytest.mark.slow
def test_a_store_is_filled_once_and_a_run_takes_it_as_its_reference(
    model_folder: Path, pairs_file: Path, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store.sqlite"
    assert main(arguments(model_folder, pairs_file, store, server, *PLAIN, "--verify", "8")) == 0
    told = capsys.readouterr()
    assert "8 pairs with" in told.err and "they differ by 0.0000 per token" in told.err
    assert f"--reference_store {store} --reference_source m@server" in told.err
    assert "reference: 40 pairs computed, 0 were there" in told.out
    assert rows_in(store) == completions_of(pairs_file) and len(server.requests) == 80
    assert main(arguments(model_folder, pairs_file, store, server, *PLAIN)) == 0
    assert len(server.requests) == 80  # nobody is asked twice

    run = ["train", "--model_name_or_path", str(model_folder), "--dataset", str(pairs_file), "--use_cpu", *PLAIN,
           "--max_steps", "2", "--gradient_accumulation_steps", "4", "--lora_r", "4", "--lint", "off"]  # fmt: skip
    source = ["--reference_store", str(store), "--reference_source", "m@server"]
    assert main([*run, "--output_dir", str(tmp_path / "served"), *source]) == 0
    assert "The reference is m@server, not the base as it is loaded here" in capsys.readouterr().err
    assert main([*run, "--output_dir", str(tmp_path / "local"), "--reference_store", "none"]) == 0
    served, local = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("served", "local"))
    assert [row["loss"] for row in served] == pytest.approx([row["loss"] for row in local], abs=1e-5)


def test_another_model_is_refused_before_it_is_asked_for_everything(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store.sqlite"
    with OpenAIServer(logps=logps_of(1)) as server:
        assert main(arguments(model_folder, pairs_file, store, server, *PLAIN, "--verify", "4")) == 65
        assert len(server.requests) == 8
    told = capsys.readouterr().err
    assert "the log-probs of m@server are those of another model: 4 pairs with" in told
    assert "Nothing was kept" in told and "instead of 0.6931" in told and rows_in(store) == 0


@pytest.mark.parametrize(("rounding", "code"), [(0.048, 0), (0.07, 0), (0.2, 65)])
def test_a_server_may_be_off_by_what_this_model_rounds(
    rounding: float, code: int, model_folder: Path, pairs_file: Path, same_model: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its own log-probs change by 0.03 per token with the cut, so that 0.09 is allowed."""

    def rounded(ids: Sequence[int]) -> list[float]:
        return [value - rounding for value in same_model(ids)]

    def noisy(self: Any, places: Sequence[int], max_tokens: int = 0) -> list[Any]:
        return [values + 0.03 * (max_tokens == 1) for values in recomputed(self, places)]

    recomputed = Recomputed.__call__
    monkeypatch.setattr(Recomputed, "__call__", noisy)
    store = tmp_path / "store.sqlite"
    with OpenAIServer(logps=rounded) as server:
        assert main(arguments(model_folder, pairs_file, store, server, *PLAIN, "--verify", "4")) == code
    found = re.search(r"above --max_drift (\S+) per token", capsys.readouterr().err)
    assert (float(found[1]) if found else None) == (pytest.approx(0.09, abs=1e-4) if code else None)


@pytest.mark.slow
def test_a_server_in_16_bit_and_a_trainer_in_4_are_two_models_unless_that_is_accepted(
    model_folder: Path, pairs_file: Path, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store.sqlite"
    assert main(arguments(model_folder, pairs_file, store, server)) == 65
    assert "the trainer in 4 bit unless --load_in_4bit is false" in capsys.readouterr().err
    assert main(arguments(model_folder, pairs_file, store, server, "--max_drift", "1")) == 0
    assert "its loss then pulls towards the served model" in capsys.readouterr().err


@pytest.mark.slow
def test_another_model_behind_the_same_name_is_noticed(
    model_folder: Path, pairs_file: Path, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, store = tmp_path / "half.jsonl", tmp_path / "store.sqlite"
    half.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:20]))
    assert main(arguments(model_folder, half, store, server, *PLAIN)) == 0
    before = rows_in(store)
    with OpenAIServer(logps=logps_of(1)) as other:
        assert main(arguments(model_folder, pairs_file, store, other, *PLAIN)) == 65
        assert f"the rows that {store} has of m@server are those of another model" in capsys.readouterr().err
        assert rows_in(store) == before
        more = ("--served_as", "other", "--max_drift", "100")
        assert main(arguments(model_folder, pairs_file, store, other, *PLAIN, *more)) == 0
    assert rows_in(store) == before + completions_of(pairs_file)


@pytest.mark.slow
def test_a_server_that_dies_loses_nothing(
    model_folder: Path, pairs_file: Path, same_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store.sqlite"
    options = (*PLAIN, "--verify", "2", "--concurrency", "2")
    with OpenAIServer(logps=same_model) as dying:
        dying.fault = lambda request: dying.die() if len(dying.requests) == 40 else None
        assert main(arguments(model_folder, pairs_file, store, dying, *options)) == 69
    assert "All answers so far are kept" in capsys.readouterr().err
    kept = rows_in(store)
    assert kept >= 34
    with OpenAIServer(logps=same_model) as server:
        assert main(arguments(model_folder, pairs_file, store, server, *options)) == 0
        assert len(server.requests) <= 80 - kept + 4 + 2  # the sample, and the other half of a pair
    assert rows_in(store) == completions_of(pairs_file)


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_answered(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.sqlite"
    with OpenAIServer(logps=made_up, delay=0.15) as server:
        command = arguments(model_folder, pairs_file, store, server, "--verify", "0", "--concurrency", "4")
        process = forks.Command(command)
        while len(server.requests) < 30:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept, asked = rows_in(store), len(server.requests)
        assert asked - 4 - 4 <= kept < completions_of(pairs_file)
        server.delay = 0.0
        assert main(arguments(model_folder, pairs_file, store, server, "--verify", "0")) == 0
        assert len(server.requests) - asked <= 80 - kept + 4  # the other halves of pairs that were in flight
    assert rows_in(store) == completions_of(pairs_file)


@pytest.mark.slow
def test_a_machine_with_the_tokenizer_alone_says_that_nothing_is_checked(
    model_folder: Path, pairs_file: Path, server: OpenAIServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(model_folder, tokenizer, ignore=shutil.ignore_patterns("*.safetensors"))
    store = tmp_path / "store.sqlite"
    assert main(arguments(tokenizer, pairs_file, store, server, "--verify", "0")) == 0
    assert "--verify 0: nothing says whether m@server is the model that is trained" in capsys.readouterr().err
    pair = load_preference_dataset(str(pairs_file), tokenizer=tiny_tokenizer())[0]
    key = keys_of(pair)[0]
    with ReferenceStore.open(store, read_only=True) as opened:
        rows = opened.of(opened.models()[0].identity).get([key])
    expected = server.logps([*pair.prompt_ids, *pair.chosen_ids])[len(pair.prompt_ids) :]
    assert np.allclose(rows[key], expected, atol=1e-6)


@pytest.mark.slow
def test_rows_that_a_chat_server_renders_otherwise_are_named_and_the_others_kept(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = json.loads(pairs_file.read_text().splitlines()[5])["prompt"]

    def render(messages: list[dict[str, str]]) -> list[int]:
        prompt, answer = ([int(word[1:]) for word in message["content"].split()] for message in messages)
        ids = [1, *prompt, 5, *answer, 2]
        return ids[:-2] if messages[0]["content"] == bad else ids

    store = tmp_path / "store.sqlite"
    with OpenAIServer(logps=made_up, render=render, routes=("/chat/completions",)) as server:
        assert main(arguments(model_folder, pairs_file, store, server, "--verify", "0")) == 65
    told = capsys.readouterr().err
    assert "2 answers have no log-probs from the server:" in told
    assert all(
        f"\n  {pairs_file}:6: {field}: the server makes other tokens" in told for field in ("chosen", "rejected")
    )
    assert rows_in(store) == completions_of(pairs_file) - 2


@pytest.mark.parametrize(
    ("more", "named"),
    [(["--verify", "4"], "--verify 4 would be ignored: there is no --endpoint"),
     (["--concurrency", "4"], "--concurrency 4 would be ignored"),
     (["--endpoint", "http://localhost:1/v1"], "--endpoint and --endpoint_model go together"),
     (["--endpoint", "localhost:1", "--endpoint_model", "m"], "write the whole address"),
     (["--endpoint", "http://localhost:1/v1", "--endpoint_model", "m", "--verify", "-1"], "must be at least 0"),
     (["--endpoint", "http://localhost:1/v1", "--endpoint_model", "m", "--verify", "0", "--max_drift", "1"],
      "--verify 0 compares nothing"),
     (["--endpoint", "http://localhost:1/v1", "--endpoint_model", "m", "--max_tokens_per_microbatch", "9"],
      "cuts its own batches")],
)  # fmt: skip
def test_what_cannot_work_or_would_be_ignored_is_refused(
    more: list[str], named: str, model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["reference", "--model_name_or_path", str(model_folder), "--dataset", str(pairs_file), "--lint", "off"]
    assert main([*words, *more]) == 2
    assert named in capsys.readouterr().err
