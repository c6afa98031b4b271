"""`compare`: the answers and log-probs of plain transformers and PEFT; a kill costs a batch; the impossible is said."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from comparisons import row
from tiny import tiny_model, tiny_tokenizer, with_lora

from eval import compare as compare_module
from eval.answering import Asked, Both, Way, answer_all
from eval.answers import Row, read_answers, read_summary
from eval.cli import main
from eval.prompts import BUILT_IN_FILE
from qlora_dpo.cli import main as train_main
from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.errors import ResourceError
from qlora_dpo.labeling.prompts import PromptRow
from qlora_dpo.models.generation import complete
from qlora_dpo.models.lora import save_adapter

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def flags(options: dict[str, Any]) -> list[str]:
    return [str(part) for name, value in options.items() if value is not None for part in (f"--{name}", value)]


def train(model_folder: Path, pairs_file: Path, folder: Path, **options: Any) -> Path:
    """A finished run that held out the last ten pairs."""
    lines = pairs_file.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:30]))
    (folder / "held_out.jsonl").write_text("".join(lines[30:]))
    options = {
        "model_name_or_path": model_folder, "dataset": folder / "train.jsonl", "output_dir": folder / "run",
        "eval_dataset": folder / "held_out.jsonl", "beta": 0.3, "max_steps": 4, "learning_rate": 0.03, "lora_r": 4,
        "gradient_accumulation_steps": 4, "max_length": 24, "max_prompt_length": 12, "lint": "off", "save_steps": 2,
        "load_in_4bit": "false", "dtype": "float32", "use_cpu": "true", "reference_store": "none",
    } | options  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # a fixture of the module runs before each test gets its own cache
        patch.setenv("QLORA_DPO_CACHE", str(folder / "cache"))
        assert train_main(["train", *flags(options)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(model_folder, pairs_file, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def compare(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command; gives its exit code and what it said."""

    def command(**options: Any) -> tuple[int, str]:
        given = {
            "adapter": run, "output": tmp_path / "out", "use_cpu": "true", "max_new_tokens": LONGEST, "kl_samples": 4,
        }  # fmt: skip
        code = main(["compare", *flags(given | options)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return command


class Plain:
    """The base with and without the adapter, by transformers and PEFT alone, one prompt at a time."""

    def __init__(self, base: Path, adapter: Path, reference: Path | None = None) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        def load(folder: Path | None) -> Any:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            return (model if folder is None else PeftModel.from_pretrained(model, str(folder))).eval()

        self.models = {"before": load(reference), "after": load(adapter)}
        self.tokenizer = tiny_tokenizer()

    def prompt_ids(self, prompt: str) -> list[int]:
        return PairTokenizer(self.tokenizer, 24, 12).render_prompt_ids(prompt)

    def write(self, side: str, prompt: str) -> list[int]:
        ids = torch.tensor([self.prompt_ids(prompt)])
        with torch.no_grad():
            found = self.models[side].generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False,
                pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
        written: list[int] = found[0, ids.shape[1] :].tolist()
        return written

    def logp(self, side: str, prompt: str, answer: Sequence[int]) -> float:
        prompt_ids = self.prompt_ids(prompt)
        ids = torch.tensor([[*prompt_ids, *answer]])
        with torch.no_grad():
            logps = self.models[side](input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        return float(logps.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1 :].sum())


def check(plain: Plain, rows: Sequence[Row], beta: float) -> None:
    for one in rows:
        for side in ("before", "after"):
            found = getattr(one, side)
            ids = plain.write(side, str(one.prompt))
            assert found.text == plain.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert found.tokens == len(ids)
            assert found.finish_reason == ("stop" if ids[-1] == 2 else "length")
            policy, reference = (plain.logp(name, str(one.prompt), ids) for name in ("after", "before"))
            assert found.logp_policy == pytest.approx(policy, abs=1e-3)
            assert found.logp_reference == pytest.approx(reference, abs=1e-3)
            assert found.logp == (found.logp_policy if side == "after" else found.logp_reference)
            assert found.logp_per_token == found.logp / len(ids)
            assert found.reward == pytest.approx(beta * (policy - reference), abs=1e-3)
            assert found.seconds > 0


def test_answers_and_logps_are_those_of_plain_transformers_and_peft(
    compare: Any, run: Path, model_folder: Path, tmp_path: Path
) -> None:
    code, said = compare(batch_size=3)
    assert code == 0, said
    assert "the chosen answers of 10 pairs are the reference answers" in said
    settings, rows = read_answers(tmp_path / "out")
    pairs = [json.loads(line) for line in (run.parent / "held_out.jsonl").read_text().splitlines()]
    assert [(one.prompt, one.reference_answer) for one in rows] == [(pair["prompt"], pair["chosen"]) for pair in pairs]
    assert [one.origin for one in rows] == [f"{run.parent / 'held_out.jsonl'}:{number}" for number in range(1, 11)]
    check(Plain(model_folder, run), rows, beta=0.3)
    assert sum(one.before.text != one.after.text for one in rows) >= 5
    assert max(abs(one.after.reward) for one in rows) > 0.01
    assert (settings["beta"], settings["max_prompt_length"], settings["temperature"]) == (0.3, 12, 0.0)
    summary = read_summary(tmp_path / "out")
    assert set(summary["verdicts"]) == {"rule:chrf", "rule:token_f1", "rule:exact"}
    assert summary["verdicts"]["rule:chrf"]["prompts"] == summary["prompts"] == 10
    assert summary["kl"]["samples"] == 4 and sum(one.sample is not None for one in rows) == 4
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert summary["held_out"]["reward_accuracy"] == metrics[-1]["eval_rewards/accuracies"]
    assert "rule:chrf" in said and "KL to the reference" in said


@pytest.mark.slow
def test_before_is_the_frozen_reference_where_the_run_had_one(
    compare: Any, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "sft"
    adapter.mkdir()
    save_adapter(with_lora(tiny_model(), r=4), adapter)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(model_folder)}))
    run = train(model_folder, pairs_file, tmp_path, reference_model=adapter, lora_r=None)
    code, said = compare(adapter=run)
    assert code == 0, said
    check(Plain(model_folder, run, adapter), read_answers(tmp_path / "out")[1], beta=0.3)


def test_the_end_token_belongs_to_the_answer() -> None:
    model, tokenizer, prompt = with_lora(tiny_model()).eval(), tiny_tokenizer(), [1, 17, 18, 5]
    ask: dict[str, Any] = {"max_new_tokens": LONGEST, "temperature": 0.0}
    (whole,) = complete(model, tokenizer, [prompt], [0], end_token_ids=[2], **ask)
    assert (whole.finish_reason, len(whole.ids)) == ("length", LONGEST)
    end = whole.ids[4]
    written = list(whole.ids[: whole.ids.index(end) + 1])
    (one,) = Both(model, tokenizer, Way(LONGEST, 0.0, end, 0.1), prompt)(
        [Asked("a", PromptRow(0, "w17 w18"), None, prompt, 0, None)]
    )
    assert (one.after.finish_reason, one.after.tokens) == ("stop", len(written))
    ids = torch.tensor([[*prompt, *written]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])
    assert one.after.logp == pytest.approx(float(logps[len(prompt) - 1 :].sum()), abs=1e-4)


@pytest.mark.slow
def test_drawn_answers_depend_on_their_seed_alone(compare: Any, tmp_path: Path) -> None:
    def texts(folder: str, **options: Any) -> list[tuple[str, str]]:
        code, said = compare(output=tmp_path / folder, temperature=1.0, **options)
        assert code == 0, said
        return [(one.before.text, one.after.text) for one in read_answers(tmp_path / folder)[1]]

    whole = texts("whole")
    assert whole == texts("alone", batch_size=1) == texts("some", batch_size=4)
    assert texts("other", seed=7) != whole
    assert len({before for before, _ in whole}) > 5


@pytest.mark.slow
def test_kl_is_about_what_the_exact_distributions_say(
    compare: Any, run: Path, model_folder: Path, tmp_path: Path
) -> None:
    """At one token the divergence can be summed over the vocabulary."""
    rows = [{"prompt": f"w{number % 100 + 10} w7"} for number in range(300)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, said = compare(prompts=tmp_path / "many.jsonl", max_new_tokens=1, kl_samples=300, batch_size=150)
    assert code == 0, said
    plain, exact = Plain(model_folder, run), []
    for one in rows:
        ids = torch.tensor([plain.prompt_ids(one["prompt"])])
        with torch.no_grad():
            after, before = (
                plain.models[side](input_ids=ids).logits[0, -1].log_softmax(-1) for side in ("after", "before")
            )
        exact.append(float((after.exp() * (after - before)).sum()))
    kl = read_summary(tmp_path / "out")["kl"]
    assert kl["interval"][0] <= sum(exact) / 300 <= kl["interval"][1] and kl["samples"] == 300
    assert kl["mean"] == pytest.approx(kl["per_token"])


def test_the_same_command_again_loads_no_model(compare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare()[0] == 0
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    (tmp_path / "out" / "summary.json").unlink()
    monkeypatch.setattr(compare_module, "load_both", None)
    code, said = compare()
    assert code == 0 and "All 10 prompts are answered" in said
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
    assert read_summary(tmp_path / "out")["prompts"] == 10


@pytest.mark.slow
def test_a_comparison_that_was_killed_goes_on_to_the_same_file(run: Path, tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        options = {"adapter": run, "output": folder, "max_new_tokens": LONGEST, "batch_size": 1, "temperature": 1.0}
        return ["compare", *flags(options | {"use_cpu": "true", "kl_samples": 3})]

    def timeless(folder: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
        for one in rows[1:]:
            for side in ("before", "after"):
                assert one[side].pop("seconds") > 0
        return rows

    assert forks.run(command(tmp_path / "whole"), tmp_path, program="eval").returncode == 0
    killed = tmp_path / "killed"
    process = forks.Command(command(killed), program="eval")
    file = killed / "answers.jsonl"
    deadline = time.monotonic() + 120
    while not file.is_file() or file.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = file.read_bytes()
    assert 4 <= left.count(b"\n") < 11 and not (killed / "summary.json").exists()
    with file.open("ab") as torn:  # what a kill within a write leaves
        torn.write(b'{"id": "0123')
    assert forks.run(command(killed), tmp_path, program="eval").returncode == 0
    assert timeless(killed) == timeless(tmp_path / "whole")
    assert set(left.splitlines()) <= set(file.read_bytes().splitlines())  # these were not answered again


def test_other_settings_than_it_began_with_are_refused(compare: Any, tmp_path: Path, run: Path) -> None:
    assert compare(max_prompts=2)[0] == 0
    for changed in ({"temperature": 0.5}, {"max_new_tokens": 5}, {"seed": 1}, {"max_prompts": 3}, {"kl_samples": 1}):
        code, said = compare(**{"max_prompts": 2} | changed)
        (name,) = changed
        assert code == 2 and name in said and "was begun with" in said
    code, said = compare(adapter=run / "checkpoint-2", max_prompts=2)
    assert code == 2 and "adapter_fingerprint" in said
    assert compare(max_prompts=2)[0] == 0


def test_prompts_that_changed_are_refused(compare: Any, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "w7"}\n{"prompt": "w8"}\n')
    assert compare(prompts=file)[0] == 0
    file.write_text('{"prompt": "w7"}\n{"prompt": "w9"}\n')
    code, said = compare(prompts=file)
    assert code == 2 and f"{file}:2" in said and "not in" in said
    file.write_text('{"prompt": "w7"}\n{"prompt": "w8"}\n{"prompt": "w9"}\n')
    assert compare(prompts=file)[0] == 0  # more prompts are no other prompts
    assert [one.prompt for one in read_answers(tmp_path / "out")[1]] == ["w7", "w8", "w9"]


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ("", 65, "prompts.jsonl"),
        ("\n\n", 65, "prompts.jsonl"),
        ('{"prompt": ""}\n', 65, "empty"),
        ('{"question": "w7"}\n', 65, "--prompt_key"),
        ('{"prompt": "w7"}\n{"prompt": 3}\n', 65, "prompts.jsonl:2"),
    ],
)
def test_prompts_that_cannot_be_used_are_named(
    compare: Any, tmp_path: Path, content: str, code: int, message: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    found, said = compare(prompts=tmp_path / "prompts.jsonl")
    assert found == code and message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_left_out_and_are_counted(compare: Any, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w7"}\n{"prompt": ""}\n{"prompt": "w8"}\n')
    code, said = compare(prompts=tmp_path / "prompts.jsonl", bad_rows="skip")
    assert code == 0 and "1 of 3 rows are left out" in said
    assert [one.prompt for one in read_answers(tmp_path / "out")[1]] == ["w7", "w8"]


def test_a_prompt_of_100_000_characters_is_cut_and_that_is_said(
    compare: Any, tmp_path: Path, run: Path, model_folder: Path
) -> None:
    long = " ".join(f"w{number % 90 + 10}" for number in range(25_000))
    assert len(long) == 99_999
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": long}) + '\n{"prompt": "w8 \\u0000 😀 w9"}\n')
    code, said = compare(prompts=tmp_path / "prompts.jsonl")
    assert code == 0 and "truncated: 1 prompts are longer than 12 tokens (the end was kept)" in said
    settings, rows = read_answers(tmp_path / "out")
    assert settings["prompts"]["truncated"] == 1 and rows[0].prompt == long
    check(Plain(model_folder, run), rows[:1], beta=0.3)


def test_pairs_and_facts_of_a_file_are_read(compare: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "w7", "chosen": "w20 w21", "rejected": "w22", "fact": "w20", "category": "a"},
        {"prompt": "w8", "chosen": "w20", "rejected": "w22", "reference_answer": "w23"},
        {"prompt": [{"role": "user", "content": "w9"}], "category": "b"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    code, said = compare(prompts=tmp_path / "prompts.jsonl")
    assert code == 0 and "the chosen answers of 1 pairs" in said
    found = read_answers(tmp_path / "out")[1]
    assert [(one.reference_answer, one.fact, one.category) for one in found] == [
        ("w20 w21", "w20", "a"), ("w23", None, None), (None, None, "b"),
    ]  # fmt: skip
    summary = read_summary(tmp_path / "out")
    assert summary["verdicts"]["rule:chrf"]["prompts"] == 2 and summary["facts"]["prompts"] == 1


def test_built_in_prompts(compare: Any, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in BUILT_IN_FILE.read_text(encoding="utf-8").splitlines()]
    by_language = {language: [one for one in rows if one["language"] == language] for language in ("en", "zh")}
    assert [len(found) for found in by_language.values()] == [40, 40]
    assert len({one["prompt"] for one in rows}) == 80
    categories = {language: {one["category"] for one in found} for language, found in by_language.items()}
    assert categories["en"] == categories["zh"] and len(categories["en"]) == 12
    assert sum("reference_answer" in one for one in rows) >= 50
    code, said = compare(prompts="built_in", max_prompts=6)
    assert code == 0, said
    summary = read_summary(tmp_path / "out")
    assert summary["prompts"] == 6 and summary["settings"]["prompts"]["source"] == "built_in"


def test_facts_of_the_built_in_prompts_are_in_their_reference_answers() -> None:
    from eval.rates import contains

    for line in BUILT_IN_FILE.read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        assert "fact" not in one or contains(one["reference_answer"], one["fact"]), one


def test_a_run_that_has_not_finished_is_refused_and_its_checkpoint_is_taken(
    compare: Any, run: Path, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "unfinished"
    shutil.copytree(run, copy)
    status = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(status | {"status": "training"}))
    code, said = compare(adapter=copy)
    assert code == 2 and "has not finished" in said and "checkpoint-4" in said
    code, said = compare(adapter=copy / "checkpoint-4", max_prompts=2)
    assert code == 0, said


def test_an_adapter_of_another_base_is_refused(compare: Any, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model(seed=5).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    code, said = compare(base_model=other)
    assert code == 65 and "other weights" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"hidden_size": 128}])
def test_a_foreign_adapter_that_does_not_fit_its_base_is_refused(
    compare: Any, tmp_path: Path, changes: dict[str, int]
) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    adapter.mkdir()
    save_adapter(with_lora(tiny_model(), r=4), adapter)
    tiny_model(**changes).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    file = adapter / "adapter_config.json"
    names = {
        "base_model_name_or_path": str(base),
        "target_modules": TARGETS,
    }  # of any layer, as most adapters have them
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    code, said = compare(adapter=adapter, prompts="built_in", max_prompts=2)
    assert code == 65 and "does not fit this base" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"max_prompts": 0}, "--max_prompts 0"),
        ({"max_prompt_length": 1}, "--max_prompt_length 1"),
        ({"temperature": -1}, "--temperature -1"),
        ({"temperature": ".inf"}, "--temperature inf"),
        ({"kl_samples": -1}, "--kl_samples -1"),
        ({"canaries": "false"}, "--canaries False would be ignored"),
    ],
)
def test_options_that_cannot_work_are_refused(compare: Any, options: dict[str, Any], message: str) -> None:
    code, said = compare(**options)
    assert code == 2 and message in said


class Memory:
    """Stands for a model on a device that holds so many prompts at once."""

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, []

    def __call__(self, batch: Sequence[Asked]) -> list[Row]:
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("full")
        return [row(one.row.number, id=one.id) for one in batch]


def asked(count: int) -> list[Asked]:
    return [Asked(str(n), PromptRow(n, "w"), None, [3] * (n % 5 + 1), n, None) for n in range(count)]


@pytest.mark.parametrize(("room", "sizes"), [(100, [8, 8, 4]), (4, [8, 4, 4, 4, 4, 4]), (3, [8, 4, *[2] * 10])])
def test_batches_are_halved_where_the_memory_runs_out(room: int, sizes: list[int]) -> None:
    memory, questions = Memory(room), asked(20)
    found = [one.id for rows in answer_all(memory, questions, set(), 8) for one in rows]
    assert memory.sizes == sizes and sorted(found, key=int) == [str(number) for number in range(20)]
    lengths = [len(questions[int(id_)].ids) for id_ in found]
    assert lengths == sorted(lengths, reverse=True)


def test_what_does_not_fit_alone_is_an_error() -> None:
    memory = Memory(0)
    with pytest.raises(ResourceError, match="one prompt"):
        list(answer_all(memory, asked(5), set(), 4))
    assert memory.sizes == [4, 2, 1]


def test_only_what_is_missing_is_answered_in_the_same_batches() -> None:
    whole, part = Memory(100), Memory(100)
    order = [one.id for rows in answer_all(whole, asked(20), set(), 8) for one in rows]
    known = set(order[:11])
    left = [one.id for rows in answer_all(part, asked(20), known, 8) for one in rows]
    assert left == order[11:] and part.sizes == [8, 4]


def test_answers_are_as_long_as_those_of_the_run_where_nothing_is_said(run: Path, tmp_path: Path) -> None:
    from qlora_dpo.config.training import TrainingOptions

    options = {"adapter": run, "output": tmp_path / "out", "use_cpu": "true", "max_prompts": 1, "kl_samples": 0}
    assert main(["compare", *flags(options)]) == 0
    begun = json.loads((tmp_path / "out" / "answers.jsonl").read_text().splitlines()[0])
    assert begun["settings"]["max_new_tokens"] == TrainingOptions().max_new_tokens != 256
