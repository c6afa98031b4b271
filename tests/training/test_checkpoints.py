"""Checkpoints: what a manifest says, which ones are deleted and when they are written."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import random_pairs, tiny_model, with_lora
from training.runs import adapter_weights, make_training

from qlora_dpo.training.folder import checkpoints as checkpoints_module
from qlora_dpo.training.folder.changes import FREE, options_hash
from qlora_dpo.training.folder.checkpoints import MANIFEST, checkpoints, newest_valid, read_manifest, rotate
from qlora_dpo.training.loop import Training, fit

PAIRS = random_pairs([(3, 4, 5), (6, 2, 7), (2, 8, 3), (4, 4, 4)])


def training_on(folder: Path, **options: Any) -> Training:
    settings = {"steps": 6, "pairs_per_step": 2, "save_steps": 2} | options
    return make_training(with_lora(tiny_model(), zero=True), PAIRS, folder, **settings)


def steps_of(folder: Path) -> list[int]:
    return [step for step, _ in checkpoints(folder)]


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_manifest_names_options_and_versions(tmp_path: Path) -> None:
    training = training_on(tmp_path)
    fit(training)
    manifest = read_manifest(tmp_path / "checkpoint-6")
    assert manifest is not None and manifest["step"] == 6
    assert manifest["config"] == options_hash({"steps": 6}) != options_hash({"steps": 7})
    for name in ("torch", "peft", "transformers", "bitsandbytes"):
        assert manifest["versions"][name] == importlib.metadata.version(name)
    assert set(manifest["versions"]) == {"qlora_dpo", "torch", "peft", "transformers", "bitsandbytes"}


def test_hash_of_the_options_is_that_of_what_decides_the_numbers() -> None:
    options = {"beta": 0.1, "output_dir": "a", "save_steps": 2}
    assert options_hash(options) == options_hash(options | {"output_dir": "b", "save_steps": 3, "fresh": True})
    assert options_hash(options) != options_hash(options | {"beta": 0.2})
    assert {"output_dir", "save_steps", "save_minutes"} <= FREE


def test_other_versions_are_said_when_a_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(training_on(tmp_path))
    fit(training_on(tmp_path))
    assert "was written with" not in capsys.readouterr().err
    now = checkpoints_module.versions() | {"torch": "99.0"}
    monkeypatch.setattr(checkpoints_module, "versions", lambda: now)
    fit(training_on(tmp_path))
    then = importlib.metadata.version("torch")
    said = capsys.readouterr().err
    assert f"checkpoint-6 was written with torch {then} (now 99.0): the last digits may differ" in said


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        '{"step": 6}',
        '{"files": []}',
        '{"files": {}}',
        '{"files": {"optimizer.pt": 7}}',
        '{"files": {"optimizer.pt": {"size": 1, "sha256": ""}}, "sha256": ""}',
    ],
)
def test_manifest_that_cannot_be_believed_rejects_its_checkpoint(manifest: str, tmp_path: Path) -> None:
    fit(training_on(tmp_path))
    (tmp_path / "checkpoint-6" / MANIFEST).write_text(manifest)
    found, rejected = newest_valid(tmp_path)
    assert found == tmp_path / "checkpoint-4" and rejected == [
        "checkpoint-6 is not used: manifest.json is missing or unreadable."
    ]


def test_every_flipped_bit_of_a_manifest_is_noticed(tmp_path: Path) -> None:
    fit(training_on(tmp_path))
    manifest = tmp_path / "checkpoint-6" / MANIFEST
    whole = manifest.read_bytes()
    sound = json.loads(whole)
    for place in range(0, len(whole), 7):
        manifest.write_bytes(whole)
        flip(manifest, place)
        try:
            is_harmless = json.loads(manifest.read_bytes()) == sound  # white space
        except ValueError:
            is_harmless = False
        found, _ = newest_valid(tmp_path)
        assert found == tmp_path / ("checkpoint-6" if is_harmless else "checkpoint-4"), place
    manifest.write_bytes(whole)
    assert newest_valid(tmp_path) == (tmp_path / "checkpoint-6", [])


# Rotation


def copies(run: Path, steps: list[int]) -> None:
    """Checkpoints of these steps, all whole, made of the one that is there."""
    (_, source), *_ = checkpoints(run)
    for step in steps:
        if not (run / f"checkpoint-{step}").exists():
            shutil.copytree(source, run / f"checkpoint-{step}")


@pytest.mark.parametrize(
    ("keep", "damaged", "left"),
    [
        (2, [], [8, 10]),
        (2, [8], [6, 8, 10]),  # one more stays
        (2, [6, 8], [4, 6, 8, 10]),
        (2, [4], [8, 10]),
        (3, [8], [6, 8, 10]),
        (3, [6], [6, 8, 10]),
        (4, [6, 8], [4, 6, 8, 10]),
        (2, [2, 4, 6, 8], [2, 4, 6, 8, 10]),
    ],
)
def test_rotation_keeps_two_that_are_valid(keep: int, damaged: list[int], left: list[int], tmp_path: Path) -> None:
    fit(training_on(tmp_path, steps=2))
    shutil.rmtree(tmp_path / "checkpoint-0")
    copies(tmp_path, [4, 6, 8, 10])
    for step in damaged:
        flip(tmp_path / f"checkpoint-{step}" / "optimizer.pt", 40)
    rotate(tmp_path, keep)
    assert steps_of(tmp_path) == left


def test_rotation_reads_only_what_it_has_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(training_on(tmp_path, steps=2))
    copies(tmp_path, [4, 6, 8, 10])
    read: list[str] = []
    original = checkpoints_module._damage
    monkeypatch.setattr(checkpoints_module, "_damage", lambda path: read.append(path.name) or original(path))
    rotate(tmp_path, 4)
    assert read == ["checkpoint-8"] and steps_of(tmp_path) == [4, 6, 8, 10]


def test_damage_in_the_run_does_not_cost_the_last_good_checkpoint(tmp_path: Path) -> None:
    training = training_on(tmp_path, steps=8)
    log = training.recorder.log

    def damage_newest(step: int, metrics: dict[str, float]) -> None:
        log(step, metrics)
        if step in (5, 7):
            flip(checkpoints(tmp_path)[-1][1] / "adapter_model.safetensors", -5)

    training.recorder.log = damage_newest  # type: ignore[method-assign]
    fit(training)
    assert steps_of(tmp_path) == [2, 4, 6, 8]
    shutil.rmtree(tmp_path / "checkpoint-8")
    assert newest_valid(tmp_path)[0] == tmp_path / "checkpoint-2"


def test_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(run: Path, keep: int) -> None:
        raise PermissionError(13, "Permission denied", "checkpoint-0")

    monkeypatch.setattr("qlora_dpo.training.folder.saving.rotate", refuse)
    fit(training_on(tmp_path))
    assert steps_of(tmp_path) == [0, 2, 4, 6]
    error = capsys.readouterr().err
    assert "warning: [Errno 13] Permission denied" in error and "cannot be written" not in error


def test_what_a_killed_process_left_half_written_is_cleared(tmp_path: Path) -> None:
    fit(training_on(tmp_path, steps=2))
    (tmp_path / ".staging-checkpoint-7").mkdir()
    (tmp_path / ".staging-checkpoint-7" / "optimizer.pt").write_bytes(bytes(100))
    (tmp_path / ".run.json.4711.tmp").write_text("{")
    fit(training_on(tmp_path, steps=2))
    assert not list(tmp_path.glob(".staging*")) and not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


# When


def test_first_checkpoint_is_written_before_the_first_step(tmp_path: Path) -> None:
    training = training_on(tmp_path)
    seen: list[list[int]] = []
    accumulate = training.engine.accumulate_gradient

    def look(*arguments: Any) -> Any:
        seen.append(steps_of(tmp_path))
        return accumulate(*arguments)

    training.engine.accumulate_gradient = look  # type: ignore[method-assign]
    fit(training)
    assert seen == [[0], [0], [0, 2], [0, 2], [2, 4], [2, 4]] and steps_of(tmp_path) == [4, 6]


def test_run_that_was_killed_in_its_first_step_continues_as_if_it_had_not(tmp_path: Path) -> None:
    unbroken = training_on(tmp_path / "unbroken")
    fit(unbroken)
    killed = training_on(tmp_path / "killed")
    killed.engine.accumulate_gradient = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    torch.manual_seed(99)
    with pytest.raises(ZeroDivisionError):
        fit(killed)
    assert steps_of(tmp_path / "killed") == [0]
    continued = training_on(tmp_path / "killed")
    fit(continued)
    for one, other in zip(adapter_weights(continued.engine.model), adapter_weights(unbroken.engine.model), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("minutes", "expected"),
    [(10.0, [0, 4, 8, 12]), (4.0, [0, 2, 4, 6, 8, 10, 12]), (0.0, [0, 12]), (25.0, [0, 9, 12])],
)
def test_checkpoints_are_written_by_the_clock_too(minutes: float, expected: list[int], tmp_path: Path) -> None:
    training = training_on(tmp_path, steps=12, save_steps=1000, save_minutes=minutes, save_total_limit=100)
    steps = [0]
    accumulate = training.engine.accumulate_gradient

    def count(*arguments: Any) -> Any:
        steps[0] += 1
        return accumulate(*arguments)

    training.engine.accumulate_gradient = count  # type: ignore[method-assign]
    training.saver.clock = lambda: 3 * 60 * steps[0]  # a step takes three minutes
    fit(training)
    assert steps_of(tmp_path) == expected


def test_clock_counts_from_the_last_checkpoint_whatever_it_was_written_for(tmp_path: Path) -> None:
    training = training_on(tmp_path, steps=12, save_steps=5, save_minutes=10.0, save_total_limit=100)
    now = [0]
    log = training.recorder.log

    def tick(step: int, metrics: dict[str, float]) -> None:
        now[0] = 4 * 60 * step
        log(step, metrics)

    training.recorder.log = tick  # type: ignore[method-assign]
    training.saver.clock = lambda: now[0]
    fit(training)
    assert steps_of(tmp_path) == [0, 3, 5, 8, 10, 12]


def test_json_files_of_a_checkpoint_can_be_read(tmp_path: Path) -> None:
    fit(training_on(tmp_path))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["step"], state["total_steps"], state["optimizer"]) == (6, 6, "AdamW")
