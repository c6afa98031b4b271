"""A run folder is known by its run.json; nothing in it but the tool's own names is ever deleted or written through."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.training.folder.checkpoints import clear_leftovers, rotate
from qlora_dpo.training.folder.owned import NAMES, is_own_name, is_run
from qlora_dpo.training.folder.run_folder import RunFolder, held_run_folder, open_run_folder
from qlora_dpo.training.folder.run_lock import LOCK, locked

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "break"


def begun(folder: Path) -> RunFolder:
    with held_run_folder(folder, {"seed": 1}, fresh=False) as run:
        run.begin(total_steps=6)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_config_yaml_makes_no_run(fresh: bool, tmp_path: Path) -> None:
    if not CASES.is_dir():
        pytest.skip("needs the shared cases")
    (tmp_path / ".git").mkdir()
    (tmp_path / "photos.zip").write_bytes(b"PK")
    (tmp_path / "config.yaml").write_bytes((CASES / "foreign_config.yaml").read_bytes())
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="no run of this tool"), held_run_folder(tmp_path, {}, fresh=fresh):
        raise AssertionError
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("status", "known"),
    [
        ({"status": "training", "run_id": "ab", "content": {}, "total_steps": 6, "step": 3}, True),
        ({"status": "finished", "total_steps": 6, "environment": {}, "step": 6}, True),  # the first ones had no id
        ({"status": "new", "run_id": "ab"}, True),
        ({"status": "ok", "run_id": "ab"}, False),
        ({"status": "finished"}, False),
        ({"run_id": "ab"}, False),
        ([], False),
    ],
)
def test_a_run_is_known_by_its_run_json(status: Any, known: bool, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "run.json").write_text(json.dumps(status))
    assert is_run(tmp_path) is known
    if known:
        run = open_run_folder(tmp_path, {"seed": 1}, fresh=False)
        assert run.status() == status
        assert run.begin() == status.get("run_id", run.status()["run_id"])
    else:
        with pytest.raises(UsageError, match="no run of this tool"):
            open_run_folder(tmp_path, {"seed": 1}, fresh=False)


def test_fresh_deletes_what_the_tool_wrote_and_nothing_else(tmp_path: Path) -> None:
    begun(tmp_path)
    own = [
        "metrics.jsonl", "samples.jsonl", "data.json", "adapter_model.safetensors", "tokenizer.json",
        "checkpoint-3/optimizer.pt", "checkpoint-4/manifest.json", ".staging-checkpoint-5/rng_state.pt",
        "compare/answers.jsonl", "pairs/train.jsonl", "tensorboard/events", ".run.json.77.tmp",
    ]  # fmt: skip
    foreign = [
        "photos.zip", "README.md", "checkpoint-3/notes.txt", "checkpoint-best/adapter_model.safetensors",
        "compare/mine.html", "notes/thesis.tex", ".hidden.77.tmp",
    ]  # fmt: skip
    for name in (*own, *foreign):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "samples").symlink_to("notes")
    with held_run_folder(tmp_path, {"seed": 2}, fresh=True):
        left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*foreign, "samples/thesis.tex", LOCK, "config.yaml", "run.json"} - {"samples/thesis.tex"}
    assert not (tmp_path / "checkpoint-4").exists() and (tmp_path / "samples").is_symlink()


def test_every_name_that_a_run_writes_is_in_the_table() -> None:
    names = (
        "config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "data.json", "training_curves.png", "README.md",
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "checkpoint-0", "checkpoint-12", "before_after.json", "pairs", "compare",
        "compare-checkpoint-3", "merge_report.json", "report.html", "tensorboard", "wandb", ".metrics.jsonl.12.tmp",
    )  # fmt: skip
    assert [name for name in names if not is_own_name(name)] == []
    assert not any(is_own_name(name) for name in ("photos.zip", "checkpoint-best", ".git", "notes", ".x.12.tmp"))
    assert NAMES


@pytest.mark.parametrize("what", ["link", "home", "repository"])
def test_fresh_is_refused_where_a_slip_costs_more(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = begun(tmp_path / "run").path
    if what == "link":
        (tmp_path / "link").symlink_to("run")
        run = tmp_path / "link"
    elif what == "home":
        monkeypatch.setenv("HOME", str(run))
    else:
        (run / ".git").mkdir()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=rf"is .*{what}"), held_run_folder(run, {"seed": 1}, fresh=True):
        raise AssertionError
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    with held_run_folder(run, {"seed": 1}, fresh=False):  # which may go on
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "checkpoint-3"])
def test_a_link_under_a_name_of_the_tools_is_refused(name: str, tmp_path: Path) -> None:
    run = begun(tmp_path / "run").path
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes((run / "run.json").read_bytes())
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(StorageError, match=f"{name} is a link"), held_run_folder(run, {"seed": 1}, fresh=True):
        raise AssertionError
    assert (run / name).is_symlink()


def test_a_lock_that_is_a_link_empties_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK")
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).symlink_to("../photos.zip")
    with pytest.raises(StorageError, match="is a link"), locked(run):
        raise AssertionError
    (run / LOCK).unlink()
    os.mkfifo(run / LOCK)
    with pytest.raises(StorageError, match="a device"), locked(run):
        raise AssertionError
    assert (tmp_path / "photos.zip").read_bytes() == b"PK"


@pytest.mark.parametrize("content", ["[]", "7", "mine", '{"user": 1}'])
def test_a_lock_of_another_program_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(StorageError, match="not the lock of a run"), locked(tmp_path):
        raise AssertionError
    assert (tmp_path / LOCK).read_text() == content


def test_sweeping_and_rotation_leave_what_is_not_the_tools(tmp_path: Path) -> None:
    kept = [".thesis.12.tmp", ".staging-checkpoint-best/a", "checkpoint-1/notes.txt", "checkpoint-best/a"]
    swept = [".metrics.jsonl.12.tmp", ".staging-checkpoint-3/optimizer.pt", "checkpoint-1/manifest.json"]
    for name in (*kept, *swept):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / "checkpoint-2").write_text("a file")
    clear_leftovers(tmp_path)
    rotate(tmp_path, 1)
    assert [name for name in kept if not (tmp_path / name).is_file()] == []
    assert not any((tmp_path / name).exists() for name in swept[:2])
    assert (tmp_path / "checkpoint-2").is_file()


def test_a_run_that_holds_its_own_input_is_refused(tmp_path: Path) -> None:
    from qlora_dpo.config.training import DataOptions, ModelOptions, TrainConfig, TrainingOptions
    from qlora_dpo.training.train import train

    run = begun(tmp_path / "run").path
    (run / "pairs").mkdir()
    (run / "pairs" / "train.jsonl").write_text("mine")
    (tmp_path / "link.jsonl").symlink_to(run / "pairs" / "train.jsonl")
    for inputs in ({"dataset": str(run / "pairs" / "train.jsonl")}, {"dataset": str(tmp_path / "link.jsonl")}):
        config = TrainConfig(
            model=ModelOptions(model_name_or_path="org/none"), data=DataOptions(**inputs),
            training=TrainingOptions(output_dir=run, fresh=True),
        )  # fmt: skip
        with pytest.raises(UsageError, match="which the run reads"):
            train(config)
    assert (run / "pairs" / "train.jsonl").read_text() == "mine"
