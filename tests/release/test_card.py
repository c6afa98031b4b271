"""The card of what is released: metadata as the Hub reads them, what was measured, and no markup of somebody else's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from released import add_comparison, change, dump, make_gguf, make_merged, make_run

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.release.cards.card import card_of, hub_datasets, write_card
from qlora_dpo.release.cards.records import read_records
from qlora_dpo.release.cards.sections import Facts, without_paths
from qlora_dpo.training.records.markdown import code_block, inline
from qlora_dpo.training.records.model_card import is_hub_id, result_lines, write_model_card
from qlora_dpo.training.records.seal import is_untouched


def card(folder: Path, run: Path | None = None, **facts: Any) -> str:
    records = read_records(folder, run)
    given = {"name": "me/demo", "base": "org/base", "license": {"license": "mit"}, "datasets": hub_datasets(records)}
    return card_of(records, Facts(**(given | facts)))


def metadata(text: str) -> dict[str, Any]:
    return ModelCard(text).data.to_dict()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_metadata_of_each_kind(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    merged, gguf = make_merged(tmp_path / "merged", run), make_gguf(tmp_path / "gguf")
    found = {kind: metadata(card(folder)) for kind, folder in (("a", run), ("m", merged), ("g", gguf))}
    named = {kind: (of["library_name"], of["base_model_relation"]) for kind, of in found.items()}
    assert named == {"a": ("peft", "adapter"), "m": ("transformers", "finetune"), "g": ("gguf", "quantized")}
    for of in found.values():
        assert (of["base_model"], of["license"], of["pipeline_tag"]) == ("org/base", "mit", "text-generation")
    assert found["a"]["datasets"] == found["m"]["datasets"] == ["org/pairs"]
    assert found["a"]["tags"] == ["dpo", "lora", "qlora_dpo"]


def test_eval_results_are_read_back_by_the_hubs_own_reader(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_comparison(run)
    results = ModelCard(card(run)).data.eval_results
    assert [(one.metric_type, one.metric_value) for one in results] == [
        ("win_rate", 0.75), ("accuracy", 0.875), ("reward_margin", 1.5)
    ]  # fmt: skip
    assert "0.530 to 0.890" in results[0].metric_name and results[0].dataset_name == "held.jsonl"


def test_sections_say_what_was_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_comparison(run)
    text = card(run, has_curves=True)
    for said in (
        "held-out reward accuracy: 0.875", "![training curves](training_curves.png)", "75.0 % (53.0 to 89.0)",
        "| refusal | 0.25 | 0.125 |", "3 of 20 answers", "All rules hold.", "| yes | kl.mean | 2.5 | below 3 |",
        "org/pairs: 40 pairs from 41 rows", "length_bias (1)", "- `beta`: 0.1", "2.5 nats per answer",
    ):  # fmt: skip
        assert said in text, said
    assert "PROMPT" in text and "PROMPT" not in card(run, samples=0)
    assert "## Merge" not in text
    bare = make_run(tmp_path / "bare")
    for name in ("data.json", "metrics.jsonl", "config.yaml", "run.json"):
        (bare / name).unlink()
    assert [line for line in card(bare).splitlines() if line.startswith("## ")] == ["## Use"]


def test_merge_table_and_what_speaks_against_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    folder = make_merged(tmp_path / "merged", run)
    dump(folder / "release_check.json", {"passed": True, "prompts": 50, "problems": []})
    text = card(folder)
    assert "| **train, bfloat16** (this one) | 0.001 |" in text and "it keeps 50 % of the margin" in text
    assert "KL per token of 0.05" in text and "replayed 50 prompts" in text
    assert "held-out reward accuracy: 0.875" in text  # of the run that the report names
    assert read_records(folder).objections() == []
    forced = make_merged(tmp_path / "forced", run, ("it keeps 60 % of the margin, less than 95 %",))
    dump(forced / "release_check.json", {"passed": False, "problems": ["another end token"]})
    assert "speak against" in (text := card(forced)) and "forced: it keeps 60 %" in text and "another end token" in text
    (forced / "merge_report.json").unlink()
    assert "Nobody measured" in card(forced)


def test_gguf_of_a_forced_merge_says_so(tmp_path: Path) -> None:
    merged = make_merged(tmp_path / "merged", make_run(tmp_path / "run"), ("it lost the preference",))
    gguf = make_gguf(tmp_path / "gguf")
    dump(gguf / "gguf_report.json", {"folder": str(merged), "run": str(tmp_path / "run")})
    records = read_records(gguf)
    assert records.run == tmp_path / "run" and "it lost the preference" in card(gguf)
    assert "ollama create demo -f Modelfile" in card(gguf) and "- `model-q8_0.gguf`" in card(gguf)


@pytest.mark.parametrize("quantization", [{}, {"load_in_4bit": False}, {"load_in_8bit": True, "load_in_4bit": False}])
def test_code_of_the_card_loads_the_base_as_it_was_held(quantization: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", **quantization)
    (code,) = python_blocks(card(run))
    compile(code, "card", "exec")
    assert ("load_in_4bit=True" in code) == (not quantization) and ("load_in_8bit=True" in code) == (
        len(quantization) > 1
    )
    assert f'revision="{"c" * 40}"' in code and '"me/demo"' in code
    (code,) = python_blocks(card(make_merged(tmp_path / "merged", run)))
    compile(code, "card", "exec")


HOSTILE = (
    "</details><script>alert(1)</script>", "![x](https://evil.example/p.png)", "[x](javascript:alert(1))",
    "```\n# mine\n```", "a | b\n---\nbase_model: evil", "<img src=x onerror=alert(1)>", "\x1b[31m\u202e",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_models_and_data_stay_texts(text: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", dataset=text, prompt_template=text)
    add_comparison(run, prompt=text, before=text, after=text * 100)
    change(run / "compare" / "gate.json", outcomes=[{"metric": text, "comparison": "below", "value": 1, "limit": text}])
    written = card(run)
    outside, fence = [], None
    for line in written.partition("\n---\n")[2].splitlines():
        mark = re.match("`{3,}", line)
        if fence is None and mark:
            fence = mark[0]
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    for bad in ("<script", "<img", "![x]", "](javascript"):
        assert not any(re.search(rf"(?<!\\){re.escape(bad)}", line) for line in outside), bad
    assert "# mine" not in outside
    assert metadata(written)["base_model"] == "org/base" and "\x1b" not in written and "\u202e" not in written


def test_inline_and_blocks() -> None:
    assert inline("a|b\n<i>`x`[y]*") == r"a\|b \<i\>\`x\`\[y\]\*"
    assert code_block("a\n````\nb")[0] == "`````text"


def test_paths_of_this_machine_become_names() -> None:
    text = "/home/ann/data/pairs.jsonl: 4 pairs, ~/x/y.json, org/set, runs/a/held.jsonl, https://host/a/b, 1/2"
    assert without_paths(text) == "pairs.jsonl: 4 pairs, y.json, org/set, held.jsonl, https://host/a/b, 1/2"


@pytest.mark.parametrize(
    ("name", "is_id"),
    [("org/base", True), ("gpt2", True), ("/a/b", False), ("./b", False), ("a/b/c", False), ("pairs.jsonl", False),
     ("data/pairs.csv", False), ("modelscope:a/b", False), ("", False), ("a/../b", False)],
)  # fmt: skip
def test_hub_ids(name: str, is_id: bool) -> None:
    assert is_hub_id(name) == is_id


def test_an_edited_card_is_told_from_an_untouched_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_card(run, "demo")
    first = (run / "README.md").read_text()
    assert is_untouched(first)
    change(run / "run.json", total_steps=61)
    (run / "metrics.jsonl").write_text('{"step": 60, "eval_rewards/accuracies": 0.5}\n')
    write_card(run, "demo")
    again = (run / "README.md").read_text()
    assert "held-out reward accuracy: 0.5" in again
    (run / "README.md").write_text(again.replace("reward accuracy: 0.5", "reward accuracy: 0.99"))
    assert not is_untouched((run / "README.md").read_text())
    write_card(run, "demo")
    assert "0.99" in (run / "README.md").read_text()
    assert not is_untouched("# a card of nobody")


def test_the_card_of_a_run_is_sealed_and_names_no_local_data_set(tmp_path: Path) -> None:
    for dataset, named in (("org/pairs", ["org/pairs"]), ("/a/pairs.jsonl", None)):
        write_model_card(
            tmp_path / "README.md", name="x", version="1", base="org/base", dataset=dataset, options={},
            quantization=None, data_summary=[], metrics=[{"step": 1}],
        )  # fmt: skip
        text = (tmp_path / "README.md").read_text()
        assert is_untouched(text) and metadata(text).get("datasets") == named


def test_results_are_of_held_out_pairs_or_of_many_steps() -> None:
    rows = [{"step": step, "loss": float(step), "rewards/accuracies": step % 2} for step in range(1, 101)]
    text = "\n".join(result_lines([*rows[:-1], rows[-1] | {"eval_loss": 0.25}]))
    assert "- held-out loss: 0.25\n" in text and text.startswith("After 100 steps:")
    assert "- training loss (mean of the last 50 steps that were logged): 75.5\n" in text
    assert text.endswith("- training reward accuracy (mean of the last 50 steps that were logged): 0.5")
    assert "training loss (of one step): 1" in "\n".join(result_lines(rows[:1]))


def test_numbers_that_belong_to_something_else_are_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_comparison(run, holds=False)
    assert read_records(run).objections() == ["the gate does not hold: kl.mean"]
    change(run / "compare" / "summary.json", prompts=21)
    records = read_records(run)
    assert not records.gate and "judged an earlier summary" in records.notes[0] and records.objections() == []
    (run / "adapter_model.safetensors").write_bytes((run / "adapter_model.safetensors").read_bytes() + b" ")
    records = read_records(run)
    assert not records.summary and "compared other weights" in records.notes[0]
    dump(run / "release_check.json", {"passed": False, "weights": "of another day", "problems": []})
    assert not read_records(run).check


def test_broken_records_are_left_out_and_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add_comparison(run)
    (run / "data.json").write_text('{"summary": [')
    (run / "config.yaml").write_text("a: [")
    (run / "compare" / "answers.jsonl").write_text("{broken\n[]\n")
    change(run / "compare" / "summary.json", verdicts={"x": {"win_rate": "high"}, "y": 3}, rates=[], kl={"mean": None})
    records = read_records(run)
    assert len(records.notes) == 4 and all(str(tmp_path) in note for note in records.notes)
    assert metadata(card(run))["library_name"] == "peft"


def test_a_checkpoint_says_its_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    change(run / "run.json", status="training", step=50)
    rows = [f'{{"step": {step}, "eval_rewards/accuracies": 0.{step}}}\n' for step in (20, 40, 60)]
    (run / "metrics.jsonl").write_text("".join(rows))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / "checkpoint-40" / name).write_bytes((run / name).read_bytes())
    text = card(run / "checkpoint-40")
    assert "checkpoint of step 40 of 60" in text and "reward accuracy: 0.4\n" in text
    with pytest.raises(UsageError, match=r"has not finished \(step 50 of 60\)"):
        read_records(run)
    merged = make_merged(tmp_path / "merged", run)
    assert read_records(merged).objections() == ["the run that it comes from has not finished"]


def test_an_exported_adapter_finds_its_run_or_says_itself_how_its_base_was_held(tmp_path: Path) -> None:
    run, folder = make_run(tmp_path / "run", load_in_4bit=False), tmp_path / "exported"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    held = {"is_known": True, "quantization": {"load_in_8bit": True}, "dtype": "float32", "adapter": str(run)}
    dump(folder / "base_quantization.json", held)
    assert read_records(folder).run == run and "not quantized" in card(folder)
    dump(folder / "base_quantization.json", held | {"adapter": "/gone"})
    text = card(folder)
    assert "BitsAndBytesConfig(load_in_8bit=True)" in text and 'dtype="float32"' in text
    (folder / "base_quantization.json").unlink()
    assert "is not recorded" in card(folder)


def test_folders_that_hold_nothing_to_release_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not there"):
        read_records(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="is empty"):
        read_records(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="is a file"):
        read_records(tmp_path / "file")
    with pytest.raises(UsageError, match="holds no adapter"):
        read_records(tmp_path)
    run = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"--run .* is no run"):
        read_records(run, tmp_path)
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="a run without an adapter yet"):
        read_records(run)


def test_all_options_are_yaml_that_can_be_read(tmp_path: Path) -> None:
    text = card(make_run(tmp_path / "run", dataset="/home/ann/pairs.jsonl"))
    options = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])  # type: ignore[index]
    assert options["beta"] == 0.1 and options["dataset"] == "pairs.jsonl" and "output_dir" not in options
    assert "/home/ann" not in text and str(tmp_path) not in text
