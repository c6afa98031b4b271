"""`score`: the numbers of plain transformers and PEFT, and of training's own evaluation; every row out again; what
cannot work is said first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, with_lora

from qlora_dpo.cli import main
from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.labeling.candidates import Candidates, read_candidates
from qlora_dpo.models.lora import save_adapter
from qlora_dpo.reference.store import ModelRows, ReferenceStore
from qlora_dpo.scoring import score as score_command
from qlora_dpo.training.records.tracking import read_metrics

PLAIN = {"load_in_4bit": "false", "dtype": "float32"}


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another program's adapter: no config.yaml beside it."""
    folder = tmp_path_factory.mktemp("adapters") / "foreign"
    folder.mkdir()
    save_adapter(with_lora(tiny_model(), r=4), folder)
    renamed(folder, model_folder)
    return folder


def renamed(adapter: Path, base: Path | None) -> None:
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": None if base is None else str(base)}
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def run(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that held out the last ten pairs."""
    folder = tmp_path_factory.mktemp("runs")
    lines = pairs_file.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:30]))
    (folder / "held_out.jsonl").write_text("".join(lines[30:]))
    options = PLAIN | {
        "model_name_or_path": model_folder, "dataset": folder / "train.jsonl", "output_dir": folder / "run",
        "eval_dataset": folder / "held_out.jsonl", "beta": 0.3, "max_steps": 4, "learning_rate": 0.01, "lora_r": 4,
        "gradient_accumulation_steps": 4, "max_length": 12, "max_prompt_length": 6, "lint": "off", "save_steps": 2,
        "reference_store": folder / "store.sqlite",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # a fixture of the module runs before each test gets its own cache
        patch.setenv("QLORA_DPO_CACHE", str(folder / "cache"))
        assert main(["train", *flags(options)]) == 0
    return folder / "run"


def flags(options: dict[str, Any]) -> list[str]:
    return [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; gives its exit code and what it said."""

    def run(**options: Any) -> tuple[int, str]:
        code = main(["score", *flags({"output": tmp_path / "scores.jsonl", "use_cpu": "true"} | options)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def rows_in(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def plain_logps(base: Path, adapter: Path | None, pairs: Any) -> np.ndarray:
    """[pairs, 2] by transformers and PEFT alone: one forward pass for each completion."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
    found = []
    for pair in pairs:
        for ids in (pair.chosen_ids, pair.rejected_ids):
            row = torch.tensor([[*pair.prompt_ids, *ids]])
            with torch.no_grad():
                logps = model.eval()(input_ids=row).logits[0, :-1].log_softmax(-1)
            per_token = logps.gather(1, row[0, 1:, None])[:, 0]
            found.append(per_token[len(pair.prompt_ids) - 1 :].double().sum().item())
    return np.array(found).reshape(-1, 2)


def test_scores_are_those_of_plain_transformers_and_peft(
    score: Any, adapter: Path, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    code, said = score(adapter=adapter, dataset=pairs_file, **PLAIN)
    assert code == 0 and "policy: 40 pairs computed, 0 were in" in said
    assert "has no config.yaml that says how its base was held" in said and "beta 0.1" in said
    pairs = load_preference_dataset(str(pairs_file), tokenizer=tiny_tokenizer())
    rewards = 0.1 * (plain_logps(model_folder, adapter, pairs) - plain_logps(model_folder, None, pairs))
    rows = rows_in(tmp_path / "scores.jsonl")
    assert len(rows) == 40 and {row["margin_of"] for row in rows} == {"rewards"}
    found = np.array([[row["chosen_reward"], row["rejected_reward"]] for row in rows])
    assert np.abs(found - rewards).max() < 1e-5 and np.abs(found).max() > 0.05
    margins = rewards[:, 0] - rewards[:, 1]
    assert [row["margin"] for row in rows] == pytest.approx(margins.tolist(), abs=1e-5)
    assert np.argsort([row["suspicion_rank"] for row in rows]).tolist() == np.argsort(margins).tolist()
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert summary["pairs"] == 40 and summary["all"]["rewards/accuracies"] == pytest.approx((margins > 0).mean())
    low, high = summary["accuracy_interval"]
    assert low < 0.5 < high
    assert summary["flipped_labels"]["why_unknown"] == "there are 40 pairs, and it takes 100"
    assert (
        "it can know nothing about which of them are wrong" in said and "most suspicious" not in said
    )  # random weights
    assert "The 10 rows with the lowest margin" in said and f"pairs.jsonl:{np.argmin(margins) + 1}\n" in said


@pytest.mark.slow
def test_margins_of_a_run_are_those_of_its_own_evaluation(score: Any, run: Path, tmp_path: Path) -> None:
    store = run.parent / "store.sqlite"
    code, said = score(adapter=run, dataset=run.parent / "held_out.jsonl", store=store)
    assert code == 0 and "warning" not in said and "(beta 0.3)" in said
    evaluated = read_metrics(run / "metrics.jsonl")[-1]
    found = json.loads((tmp_path / "scores.summary.json").read_text())
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert found["all"][name] == pytest.approx(evaluated[f"eval_{name}"], abs=1e-5)
    assert found["trained_on_dataset"] is False and found["quantization"] is None
    assert "reference: 0 pairs computed, 10 were in" in said  # the run had computed them
    assert max(row["chosen_tokens"] for row in rows_in(tmp_path / "scores.jsonl")) < 12  # cut as in the run
    code, said = score(adapter=run, dataset=run.parent / "train.jsonl", output=tmp_path / "seen.jsonl")
    assert code == 0 and "The adapter was trained on this very data set" in said


@pytest.mark.slow
def test_checkpoint_is_scored_and_an_unfinished_run_names_it(score: Any, run: Path, tmp_path: Path) -> None:
    dataset = run.parent / "held_out.jsonl"
    assert score(adapter=run / "checkpoint-4", dataset=dataset)[0] == 0
    assert score(adapter=run, dataset=dataset, output=tmp_path / "b.jsonl")[0] == 0
    one, other = (rows_in(tmp_path / name) for name in ("scores.jsonl", "b.jsonl"))
    assert [row["margin"] for row in one] == [row["margin"] for row in other]
    assert score(adapter=run / "checkpoint-2", dataset=dataset, output=tmp_path / "c.jsonl")[0] == 0
    assert [row["margin"] for row in rows_in(tmp_path / "c.jsonl")] != [row["margin"] for row in one]
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    (unfinished / "run.json").write_text(json.dumps({"status": "training"}))
    code, said = score(adapter=unfinished, dataset=dataset, output=tmp_path / "d.jsonl")
    assert code == 2 and "has not finished" in said and f"{unfinished}/checkpoint-4" in said


@pytest.mark.slow
def test_command_line_wins_and_what_differs_from_the_run_is_said(score: Any, run: Path, tmp_path: Path) -> None:
    dataset = run.parent / "held_out.jsonl"
    assert score(adapter=run, dataset=dataset)[0] == 0
    code, said = score(adapter=run, dataset=dataset, beta=0.6, max_length=13, output=tmp_path / "b.jsonl")
    assert code == 0 and "the scores are of other options than the run's, which has beta 0.3, max_length 12." in said
    one, other = (json.loads((tmp_path / f"{name}.summary.json").read_text()) for name in ("scores", "b"))
    assert (one["beta"], other["beta"]) == (0.3, 0.6)


@pytest.mark.slow
def test_killed_command_goes_on_and_a_whole_store_needs_no_model(
    score: Any, adapter: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PLAIN | {"adapter": adapter, "dataset": pairs_file, "store": tmp_path / "store.sqlite"}
    put, puts = ModelRows.put, []

    def dying(self: ModelRows, rows: Any) -> None:
        puts.append(len(rows))
        if len(puts) == 5:
            raise KeyboardInterrupt
        put(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRows, "put", dying)
        code, said = score(max_tokens_per_microbatch=200, **options)
    assert code == 130 and not list(tmp_path.glob("scores*")) and not list(tmp_path.glob(".scores*"))
    code, said = score(max_tokens_per_microbatch=200, **options)
    assert code == 0 and "reference: 0 pairs computed, 40 were in" in said
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        assert len(store.models()) == 2
    monkeypatch.setattr(score_command, "load_base_of", lambda *_: pytest.fail("the model was loaded"))
    code, said = score(beta=0.5, output=tmp_path / "b.jsonl", **options)
    assert code == 0 and "policy: 0 pairs computed, 40 were in" in said
    one, other = (rows_in(tmp_path / name) for name in ("scores.jsonl", "b.jsonl"))
    assert [5 * row["margin"] for row in one] == pytest.approx([row["margin"] for row in other])


@pytest.mark.slow
def test_policy_is_filled_ahead_as_a_reference(
    score: Any, adapter: Path, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    options = PLAIN | {"dataset": pairs_file, "store": tmp_path / "store.sqlite"}
    ahead = {"model_name_or_path": model_folder, "reference_model": adapter, "use_cpu": "true", "lint": "off"}
    assert main(["reference", *flags(options | ahead)]) == 0
    code, said = score(adapter=adapter, **options)
    assert code == 0 and "reference: 40 pairs computed" in said and "policy: 0 pairs computed, 40 were in" in said


@pytest.mark.slow
def test_without_an_adapter_the_model_itself_is_looked_at(
    score: Any, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    code, said = score(adapter="none", model_name_or_path=model_folder, dataset=pairs_file, **PLAIN)
    assert (
        code == 0 and "Without an adapter nobody has learned" in said and "itself; the margin is chosen minus" in said
    )
    pairs = load_preference_dataset(str(pairs_file), tokenizer=tiny_tokenizer())
    tokens = np.array([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs])
    expected = plain_logps(model_folder, None, pairs) / tokens
    rows = rows_in(tmp_path / "scores.jsonl")
    assert [row["margin"] for row in rows] == pytest.approx((expected[:, 0] - expected[:, 1]).tolist(), abs=1e-5)
    assert {row["margin_of"] for row in rows} == {"reference_logps_per_token"} and "chosen_reward" not in rows[0]
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert (summary["adapter"], summary["beta"], summary["flipped_labels"]) == ("none", None, None)


def test_adapter_counts_from_the_adapter_that_is_its_reference(
    score: Any, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    code, _ = score(adapter=adapter, reference_model=adapter, dataset=pairs_file, **PLAIN)
    assert code == 0 and {row["margin"] for row in rows_in(tmp_path / "scores.jsonl")} == {0.0}


def labelled_again(file: Path) -> list[Candidates]:
    found = list(read_candidates(str(file)))
    assert all(isinstance(candidates, Candidates) for candidates in found)
    return [candidates for candidates in found if isinstance(candidates, Candidates)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_rows_are_the_pairs_and_labellers_take_them(
    suffix: str, score: Any, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"scores{suffix}"
    code, _ = score(adapter=adapter, dataset=pairs_file, output=file, per_token="true", **PLAIN)
    assert code == 0
    again = labelled_again(file)
    assert [(one.prompt, set(one.answers)) for one in again] == [
        (row["prompt"], {row["chosen"], row["rejected"]}) for row in rows_in(pairs_file)
    ]
    pairs = load_preference_dataset(str(file), tokenizer=tiny_tokenizer())
    assert list(pairs[:40]) and len(pairs) == 40
    rules = tmp_path / "rules.yaml"
    rules.write_text("- {rule: length, min: 1, max: 40}\n")
    labelled = tmp_path / "labelled.jsonl"
    assert main(["label", "rules", "--candidates", str(file), "--rules", str(rules), "--output", str(labelled)]) == 0


def test_tokens_add_up(score: Any, adapter: Path, pairs_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.parquet"
    assert score(adapter=adapter, dataset=pairs_file, output=file, per_token="true", worst=7, **PLAIN)[0] == 0
    rows = pq.read_table(file).to_pylist()
    assert [row["suspicion_rank"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    for row in rows:
        for side in ("chosen", "rejected"):
            assert row[f"{side}_token_texts"] == [*row[side].split(), "</s>"]
            policy, reference = (row[f"{name}_{side}_token_logps"] for name in ("policy", "reference"))
            assert len(row[f"{side}_token_ids"]) == len(policy) == row[f"{side}_tokens"]
            assert 0.1 * (sum(policy) - sum(reference)) == pytest.approx(row[f"{side}_reward"], abs=1e-4)
            assert np.mean(policy) == pytest.approx(row[f"policy_{side}_logp_per_token"], abs=1e-5)


def test_messages_categories_and_bad_rows_are_kept_apart(score: Any, adapter: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}]
    rows = [
        {"prompt": "w9", "chosen": "w8", "rejected": "w7 w6", "category": "short"},
        {"prompt": [*turns, {"role": "user", "content": "w6\x1b[31m"}], "chosen": "w8", "rejected": "w9",
         "category": "long\x1b[31m", "confidence": 0.75},
        {"prompt": "w9", "chosen": "w8", "rejected": "w8", "category": "short"},
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PLAIN | {"adapter": adapter, "dataset": file, "dataset_format": "messages"}
    code, said = score(**options)
    assert code == 65 and "rejected: the same answer as chosen" in said
    code, said = score(bad_rows="skip", **options)
    assert code == 0 and "\x1b[31m" not in said and "\\x1b[31m" in said
    found = rows_in(tmp_path / "scores.jsonl")
    assert [row["prompt"][-1]["role"] for row in found] == ["user", "user"] and len(found[1]["prompt"]) == 3
    assert [row["confidence"] for row in found] == [1.0, 0.75] and found[0]["origin"] == f"{file}:1"
    assert len(labelled_again(tmp_path / "scores.jsonl")) == 2
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert (summary["rows_read"], summary["pairs"]) == (3, 2)
    assert summary["refused"] == {"rejected: the same answer as chosen": 1}
    assert set(summary["categories"]) == {"short", "long\x1b[31m"}


def test_mixture_names_its_sources_and_has_one_form(
    score: Any, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "other.jsonl"
    rows = rows_in(pairs_file)[:5]
    as_messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    copy.write_text("".join(json.dumps(row) + "\n" for row in as_messages))
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"sources:\n- {{path: {pairs_file}, sample_rate: 0.5}}\n- {{path: {copy}}}\n")
    assert score(adapter=adapter, dataset=mixture, **PLAIN)[0] == 0
    rows = rows_in(tmp_path / "scores.jsonl")
    assert [row["origin"] for row in rows[38:42]] == [f"{pairs_file}:39", f"{pairs_file}:40", f"{copy}:1", f"{copy}:2"]
    assert rows[0]["margin"] == rows[40]["margin"] and rows[0]["prompt"] == rows[40]["prompt"]
    assert len(labelled_again(tmp_path / "scores.jsonl")) == 45
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert {name: means["count"] for name, means in summary["categories"].items()} == {"pairs": 40, "other": 5}


@pytest.mark.slow
def test_another_base_than_the_adapters_is_refused_or_said(
    score: Any, run: Path, adapter: Path, pairs_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    code, said = score(adapter=run, dataset=pairs_file, model_name_or_path=other)
    assert code == 65 and f"{other} is not the base that {run} was trained on" in said
    code, said = score(adapter=adapter, dataset=pairs_file, model_name_or_path=other, **PLAIN)
    assert code == 0 and "as its base; the scores are of the adapter on" in said
    wider = tmp_path / "wider"
    tiny_model(hidden_size=128).save_pretrained(wider)
    tiny_tokenizer().save_pretrained(wider)
    more = PLAIN | {"model_name_or_path": wider, "output": tmp_path / "b.jsonl"}
    code, said = score(adapter=adapter, dataset=pairs_file, **more)
    assert code == 65 and "the adapter does not fit this base" in said


@pytest.mark.slow
def test_what_cannot_work_is_said_first(
    score: Any, adapter: Path, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_command, "load_training_data", lambda *_: pytest.fail("data were read"))
    there = tmp_path / "there.jsonl"
    there.write_text("{}\n")
    baseless = tmp_path / "baseless"
    shutil.copytree(adapter, baseless)
    renamed(baseless, None)
    base = {"model_name_or_path": model_folder}
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"adapter": tmp_path / "nowhere"}, 74, "there is no adapter_config.json"),
        ({"adapter": model_folder}, 65, "is a whole model, not an adapter"),
        ({"adapter": baseless}, 2, f"--adapter {baseless} names no base, so score needs --model_name_or_path"),
        ({"adapter": "none"}, 2, "--adapter none needs --model_name_or_path"),
        ({"adapter": "none", "beta": 0.5} | base, 2, "--beta 0.5 would be ignored: --adapter none gives no rewards"),
        ({"beta": 0}, 2, "--beta 0.0: must be above 0"),
        ({"worst": 0}, 2, "--worst 0: must be above 0"),
        ({"objective": "sft"}, 2, "--objective sft has no pairs"),
        ({"eval_fraction": 0.2}, 2, "--eval_fraction 0.2 would be ignored: score takes every pair"),
        ({"dataset": None}, 2, "score needs --dataset"),
        ({"output": there}, 2, "exists. Name another file"),
        ({"output": tmp_path / "scores.csv"}, 2, "must end with one of .jsonl, .jsonl.gz, .parquet"),
        ({"output": there / "scores.jsonl"}, 74, "cannot be written"),
        ({"store": there}, 74, "there.jsonl"),
        ({"reference_model": tmp_path / "nowhere"}, 74, "there is no adapter_config.json"),
    ]
    for options, expected, text in wrong:
        code, said = score(**{"adapter": adapter, "dataset": pairs_file} | options)
        assert code == expected and text in said, (options, said)


def test_nothing_usable_and_nothing_finite(
    score: Any, adapter: Path, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"prompt": "w9", "chosen": "w8", "rejected": "w8"}) + "\n")
    code, said = score(adapter=adapter, dataset=empty, bad_rows="skip", **PLAIN)
    assert code == 65 and "none of the 1 rows is a plaintext pair" in said
    broken = tmp_path / "broken"
    broken.mkdir()
    model = with_lora(tiny_model(), r=4)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    save_adapter(model, broken)
    renamed(broken, model_folder)
    code, said = score(adapter=broken, dataset=pairs_file, **PLAIN)
    assert code == 65 and "a log-prob that is not finite" in said and not list(tmp_path.glob("*scores*"))


@pytest.mark.slow
def test_flips_in_pairs_that_a_run_has_not_seen_are_estimated(score: Any, model_folder: Path, tmp_path: Path) -> None:
    """A tiny model learns to prefer answers of even words; a fifth of the held-out labels is flipped."""
    generator = np.random.default_rng(0)

    def pair(flipped: bool) -> dict[str, str]:
        prompt, even, odd = (generator.integers(low, 60, 6) * 2 + low % 2 for low in (2, 4, 5))
        texts = [" ".join(f"w{number}" for number in numbers) for numbers in (prompt, even, odd)]
        return dict(
            zip(("prompt", "rejected", "chosen") if flipped else ("prompt", "chosen", "rejected"), texts, strict=True)
        )

    for name, count, share in (("train", 200, 0.0), ("seen", 300, 0.2)):
        rows = [pair(place < share * count) for place in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PLAIN | {
        "model_name_or_path": model_folder, "dataset": tmp_path / "train.jsonl", "output_dir": tmp_path / "run",
        "max_steps": 25, "learning_rate": 0.005, "gradient_accumulation_steps": 8, "lora_r": 8, "lint": "off",
        "eval_fraction": 0, "use_cpu": "true",
    }  # fmt: skip
    assert main(["train", *flags(options)]) == 0
    code, said = score(adapter=tmp_path / "run", dataset=tmp_path / "seen.jsonl")
    assert code == 0 and "--loss_type robust --label_smoothing 0." in said
    found = json.loads((tmp_path / "scores.summary.json").read_text())["flipped_labels"]
    assert found["why_unknown"] is None and found["share"] == pytest.approx(0.2, abs=0.04)
    worst = [int(row["origin"].rsplit(":")[-1]) for row in rows_in(tmp_path / "scores.jsonl") if row["margin"] < 0]
    assert len(set(worst) & set(range(1, 61))) >= 57
