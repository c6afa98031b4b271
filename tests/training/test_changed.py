"""A run goes on as it began, or with changes that somebody allowed by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import random_pairs, tiny_model, tiny_tokenizer, with_lora
from training.runs import make_training

from qlora_dpo.cli import main
from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.reference import identity
from qlora_dpo.training.folder.changes import CONTENT, FIXED, FREE
from qlora_dpo.training.folder.checkpoints import checkpoints
from qlora_dpo.training.folder.content import weights_fingerprint
from qlora_dpo.training.folder.run_folder import RunFolder, open_run_folder
from qlora_dpo.training.loop import fit
from qlora_dpo.training.records.tracking import read_metrics
from qlora_dpo.training.train import content_of

PAIRS = random_pairs([(3, 4, 5), (6, 2, 7), (2, 8, 3), (4, 4, 4)])
OPTIONS = {"beta": 0.1, "learning_rate": 0.5, "max_length": 64, "dataset": "a.jsonl", "prompt_template": None}


def begun(folder: Path, options: dict[str, Any] = OPTIONS, content: dict[str, str] | None = None) -> RunFolder:
    run = open_run_folder(folder, options, fresh=False).with_content(content or {"dataset": "1" * 64})
    run.begin(total_steps=9)
    run.update_status(step=4)
    return run


def again(folder: Path, *allowed: str, content: dict[str, str] | None = None, **changes: Any) -> RunFolder:
    run = open_run_folder(folder, OPTIONS | changes, fresh=False, allow_changed=allowed)
    return run.with_content(content or {"dataset": "1" * 64})


def test_same_options_go_on(tmp_path: Path) -> None:
    run_id = begun(tmp_path).status()["run_id"]
    run = again(tmp_path)
    assert run.changes == () and run.begin() == run_id == run.status()["run_id"]
    assert len(run_id) == 16 and run.status()["changed"] == []


def test_id_of_the_run_is_new_with_fresh(tmp_path: Path) -> None:
    run_id = begun(tmp_path).status()["run_id"]
    run = open_run_folder(tmp_path, OPTIONS, fresh=True)
    assert run.status()["status"] == "new" and run.begin() != run_id


def test_every_difference_is_named_with_both_values(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(UsageError) as refused:
        again(tmp_path, learning_rate=0.25, prompt_template="plain", save_steps=7)
    text = str(refused.value)
    assert "  learning_rate: was 0.5, now 0.25\n  prompt_template: was None, now plain\n" in text
    assert "--fresh, or let it go on with the change: --allow_changed learning_rate prompt_template." in text
    assert "save_steps" not in text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == OPTIONS  # refused, so nothing was written


def test_allowed_change_is_recorded_with_its_step(tmp_path: Path) -> None:
    begun(tmp_path)
    run = again(tmp_path, "learning_rate", learning_rate=0.25)
    run.begin()
    entry = {"step": 4, "name": "learning_rate", "was": 0.5, "now": 0.25}
    assert run.status()["changed"] == [entry]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == OPTIONS | {"learning_rate": 0.25}
    same_again = again(tmp_path, "learning_rate", learning_rate=0.25)  # the same command after a stop
    same_again.begin()
    assert same_again.status()["changed"] == [entry]
    with pytest.raises(UsageError, match=r"learning_rate: was 0\.25, now 0\.5"):
        again(tmp_path)


def test_run_that_is_refused_later_keeps_what_it_began_with(tmp_path: Path) -> None:
    begun(tmp_path)
    again(tmp_path, "learning_rate", learning_rate=0.25)  # and then, say, the GPU is full
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == OPTIONS
    assert RunFolder(tmp_path).status()["changed"] == []


def test_only_what_is_named_is_allowed(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(UsageError, match=r"beta: was 0\.1, now 0\.2") as refused:
        again(tmp_path, "learning_rate", learning_rate=0.25, beta=0.2)
    assert "learning_rate: was" not in str(refused.value)


@pytest.mark.parametrize("name", ["beta", "dataset"])
def test_permission_for_what_has_not_changed_is_refused(name: str, tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(UsageError, match=f"--allow_changed {name}: nothing has changed there"):
        again(tmp_path, name)


def test_permission_that_is_not_needed_says_so(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(UsageError, match=r"save_steps may differ without it"):
        again(tmp_path, "save_steps", save_steps=7)


def test_permission_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run has begun in"):
        open_run_folder(tmp_path, OPTIONS, fresh=False, allow_changed=["beta"])


def test_other_content_under_the_same_name_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    other = {"dataset": "2" * 64}
    with pytest.raises(UsageError, match=f"dataset: was content {'1' * 12}, now content {'2' * 12}") as refused:
        again(tmp_path, content=other)
    assert "--allow_changed dataset." in str(refused.value)
    run = again(tmp_path, "dataset", content=other)
    run.begin()
    assert run.status()["content"] == other
    assert [entry["name"] for entry in run.status()["changed"]] == ["dataset"]


def test_content_that_an_allowed_option_changes_needs_no_permission_of_its_own(tmp_path: Path) -> None:
    begun(tmp_path)
    other = {"dataset": "2" * 64}
    again(tmp_path, "max_length", content=other, max_length=32).begin()
    assert [entry["name"] for entry in RunFolder(tmp_path).status()["changed"]] == ["max_length"]
    with pytest.raises(UsageError, match="dataset: was content"):
        open_run_folder(
            tmp_path, OPTIONS | {"max_length": 32, "beta": 0.2}, fresh=False, allow_changed=["max_length", "beta"]
        ).with_content({"dataset": "3" * 64})


def test_what_checkpoints_are_made_of_cannot_be_allowed(tmp_path: Path) -> None:
    begun(tmp_path, OPTIONS | {"lora_r": 8})
    with pytest.raises(UsageError, match=r"lora_r: was 8, now 16 \(no checkpoint could go on") as refused:
        again(tmp_path, "lora_r", lora_r=16)
    assert "let it go on" not in str(refused.value)


BY_STEPS = OPTIONS | {"max_steps": 4, "num_train_epochs": 1.0}
BY_EPOCHS = BY_STEPS | {"max_steps": -1}


def finished(folder: Path, options: dict[str, Any]) -> None:
    begun(folder, options).update_status(status="finished")


@pytest.mark.parametrize(
    ("was", "more"),
    [
        (BY_STEPS, {"max_steps": 6}),
        (BY_STEPS, {"max_steps": -1}),
        (BY_EPOCHS, {"num_train_epochs": 2.0}),
        (BY_EPOCHS, {"max_steps": 6}),
    ],
)
def test_a_finished_run_offers_to_go_on_with_more_steps_and_does(
    was: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    finished(tmp_path, was)
    (name,) = more
    with pytest.raises(UsageError, match=f"let it go on with the change: --allow_changed {name}"):
        open_run_folder(tmp_path, was | more, fresh=False)
    run = open_run_folder(tmp_path, was | more, fresh=False, allow_changed=[name])
    assert not run.has_nothing_to_do
    run.refuse_fewer_steps(5)
    with pytest.raises(UsageError, match="has finished its 4 steps, and these options ask for 4: nothing is left"):
        run.refuse_fewer_steps(4)


@pytest.mark.parametrize(
    ("was", "other"),
    [(BY_STEPS, {"max_steps": 3}), (BY_EPOCHS, {"num_train_epochs": 0.5}), (BY_STEPS, {"learning_rate": 0.25})],
)
def test_a_finished_run_offers_nothing_that_leaves_it_nothing_to_do(
    was: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    finished(tmp_path, was)
    (name,) = other
    for allowed in ([], [name]):
        with pytest.raises(UsageError, match=f"  {name}: was .*\nNothing is left to train with that") as refused:
            open_run_folder(tmp_path, was | other, fresh=False, allow_changed=allowed)
        assert "--allow_changed" not in str(refused.value)
    assert open_run_folder(tmp_path, was, fresh=False).has_nothing_to_do


def test_epochs_may_differ_where_steps_are_given(tmp_path: Path) -> None:
    finished(tmp_path, BY_STEPS)
    assert open_run_folder(tmp_path, BY_STEPS | {"num_train_epochs": 2.0}, fresh=False).has_nothing_to_do


def test_option_that_an_older_version_did_not_have_had_its_default(tmp_path: Path) -> None:
    begun(tmp_path)
    again(tmp_path, weight_decay=0.0)
    with pytest.raises(UsageError, match=r"weight_decay: was 0\.0, now 0\.1"):
        again(tmp_path, weight_decay=0.1)


def test_tables_name_options() -> None:
    from qlora_dpo.config.training import TrainConfig

    known = TrainConfig().flat().keys()
    assert known >= FREE | FIXED | CONTENT.keys() and all(known >= names for names in CONTENT.values())
    assert not FREE & FIXED


def test_unreadable_config_is_a_sentence(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "config.yaml").write_text("{")
    with pytest.raises(StorageError, match="nobody knows what this run began with"):
        again(tmp_path)


# What an allowed change does


def lr_of_steps(folder: Path) -> list[float]:
    return [row["learning_rate"] for row in read_metrics(folder / "metrics.jsonl")]


def training_on(folder: Path, *, r: int = 4, **options: Any) -> Any:
    return make_training(with_lora(tiny_model(), r=r, zero=True), PAIRS, folder, **({"steps": 8} | options))


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine", "constant_with_warmup"])
def test_new_learning_rate_holds_from_the_step_it_was_allowed_at(scheduler: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr_scheduler_type": scheduler, "save_steps": 4, "pairs_per_step": 2}
    for name, rate in (("low", 1e-3), ("high", 2e-3)):
        fit(training_on(tmp_path / name, learning_rate=rate, **settings))
    (tmp_path / "changed").mkdir()
    for name in ("config.yaml", "run.json"):
        shutil.copy(tmp_path / "low" / name, tmp_path / "changed")
    shutil.copytree(tmp_path / "low" / "checkpoint-4", tmp_path / "changed" / "checkpoint-4")
    shutil.copy(tmp_path / "low" / "metrics.jsonl", tmp_path / "changed")
    training = training_on(tmp_path / "changed", learning_rate=2e-3, **settings)
    fit(training)
    assert lr_of_steps(tmp_path / "changed") == [
        *lr_of_steps(tmp_path / "low")[:4],
        *lr_of_steps(tmp_path / "high")[4:],
    ]
    (group,) = training.optimizer.param_groups
    assert group["lr"] == training.scheduler.get_last_lr()[0]


def test_betas_and_weight_decay_are_those_of_the_options(tmp_path: Path) -> None:
    fit(training_on(tmp_path, save_steps=4))
    shutil.rmtree(tmp_path / "checkpoint-8")
    training = training_on(tmp_path, save_steps=4)
    for group in training.optimizer.param_groups:
        group.update(betas=(0.8, 0.9), weight_decay=0.3)
    fit(training)
    assert [(group["betas"], group["weight_decay"]) for group in training.optimizer.param_groups] == [((0.8, 0.9), 0.3)]
    assert all(state["step"] == 8 for state in training.optimizer.state.values())  # the moments went on


def test_other_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    fit(training_on(tmp_path))
    training = training_on(tmp_path)
    training.optimizer = torch.optim.SGD(training.parameters, lr=0.1)
    with pytest.raises(UsageError, match="was written with the optimizer AdamW, and here it would be SGD"):
        fit(training)


def test_checkpoint_of_another_shape_is_a_sentence(tmp_path: Path) -> None:
    fit(training_on(tmp_path))
    with pytest.raises(ModelError, match="checkpoint-8 does not fit this run"):
        fit(training_on(tmp_path, r=8))


# Fingerprints


def test_fingerprint_of_weights_sees_other_weights_and_nothing_else(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
    one, same, other = (weights_fingerprint(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other
    (tmp_path / "one" / "README.md").write_text("renamed and described")
    assert weights_fingerprint(tmp_path / "one") == one


def test_fingerprint_sees_one_changed_byte_and_reads_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(8 << 20))
    before = weights_fingerprint(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(identity, "_hash", None)
        assert weights_fingerprint(tmp_path) == before
    with file.open("r+b") as opened:
        opened.seek(5_123_457)
        opened.write(b"\1")
    assert weights_fingerprint(tmp_path) != before


# The command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A base of this test's own, to be changed."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def train(model: Path, pairs: Path, out: Path, *more: str) -> int:
    options = {
        "--model_name_or_path": model, "--dataset": pairs, "--output_dir": out, "--max_steps": 4, "--save_steps": 2,
        "--gradient_accumulation_steps": 2, "--dtype": "float32", "--lora_r": 4,
    }  # fmt: skip
    return main(["train", *(str(part) for pair in options.items() for part in pair), *more])


def unfinish(run: Path) -> None:
    """As if the run had been killed after step 2."""
    shutil.rmtree(run / "checkpoint-4")
    RunFolder(run).update_status(status="training", step=2)


@pytest.mark.slow
def test_changed_circumstances_are_refused_and_can_be_allowed(
    model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    shutil.copy(pairs_file, pairs)
    assert train(model, pairs, out) == 0
    run_id = RunFolder(out).status()["run_id"]

    def refused(*more: str) -> str:
        capsys.readouterr()
        before = (out / "config.yaml").read_text(), (out / "run.json").read_text()
        assert train(model, pairs, out, *more) == 2
        assert ((out / "config.yaml").read_text(), (out / "run.json").read_text()) == before
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error[error.index("error: ") :]

    unfinish(out)
    assert "learning_rate: was 1e-05, now 0.001" in refused("--learning_rate", "0.001")
    assert "prompt_template: was None, now plain" in refused("--prompt_template", "plain")
    assert "model_revision: was None, now main" in refused("--model_revision", "main")
    assert "gradient_accumulation_steps: was 2, now 4" in refused("--gradient_accumulation_steps", "4")
    assert "no such option; the nearest is learning_rate" in refused("--allow_changed", "lerning_rate")
    assert "beta: nothing has changed" in refused("--allow_changed", "beta")
    assert "would be ignored: --fresh" in refused("--allow_changed", "beta", "--fresh")

    rows = pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join(rows[:-1]))
    assert "dataset: was content" in refused()
    assert train(model, pairs, out, "--allow_changed", "dataset") == 0
    assert [(entry["step"], entry["name"]) for entry in RunFolder(out).status()["changed"]] == [(2, "dataset")]

    unfinish(out)
    tiny_model(seed=1).save_pretrained(model)
    assert "model_name_or_path: was content" in refused("--allow_changed", "dataset")
    allowed = ["--allow_changed", "dataset", "model_name_or_path", "learning_rate", "--learning_rate", "0.001"]
    assert train(model, pairs, out, *allowed) == 0
    assert [entry["name"] for entry in RunFolder(out).status()["changed"]] == [
        "dataset", "learning_rate", "model_name_or_path",
    ]  # fmt: skip
    assert RunFolder(out).status()["run_id"] == run_id
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["learning_rate"] == 0.001 and "allow_changed" not in config and "fresh" not in config


@pytest.mark.slow
def test_continued_run_goes_on_in_the_same_wandb_run(model: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for _ in range(2):
        assert train(model, pairs_file, out, "--report_to", "wandb") == 0
        unfinish(out)
    folders = list((out / "wandb").glob("offline-run-*"))
    assert {folder.name.rpartition("-")[2] for folder in folders} == {RunFolder(out).status()["run_id"]}
    assert len(folders) == 2  # `wandb sync` joins them by this id


@pytest.mark.slow
def test_moved_base_needs_permission_but_is_the_same_base(
    model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(model, pairs_file, out) == 0
    unfinish(out)
    moved = model.rename(tmp_path / "moved")
    assert train(moved, pairs_file, out) == 2
    assert f"model_name_or_path: was {model}, now {moved}" in capsys.readouterr().err
    assert train(moved, pairs_file, out, "--allow_changed", "model_name_or_path") == 0
    assert len(checkpoints(out)) == 2


def test_content_names_the_reference_adapter_too(model: Path, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from qlora_dpo.config.training import ModelOptions, TrainConfig
    from qlora_dpo.models.lora import save_adapter

    adapter = tmp_path / "sft"
    adapter.mkdir()
    save_adapter(with_lora(tiny_model()), adapter)
    data: Any = SimpleNamespace(fingerprint="ids")
    options = ModelOptions(model_name_or_path=str(model), reference_model=str(adapter))
    content = content_of(TrainConfig(model=options), data)
    assert content.keys() == CONTENT.keys() and content["dataset"] == "ids"
    save_adapter(with_lora(tiny_model(), seed=5), adapter)
    assert content_of(TrainConfig(model=options), data)["reference_model"] != content["reference_model"]
    assert "reference_model" not in content_of(TrainConfig(model=ModelOptions(model_name_or_path=str(model))), data)


def test_status_is_plain_json(tmp_path: Path) -> None:
    begun(tmp_path)
    again(tmp_path, "learning_rate", learning_rate=0.25).begin(environment={"torch": "x"})
    status = json.loads((tmp_path / "run.json").read_text())
    assert {"status", "run_id", "content", "changed", "step", "environment"} <= status.keys()
