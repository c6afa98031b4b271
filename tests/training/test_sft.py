"""SFT on the same engine: packing changes nothing, the loss is TRL's, runs continue exactly, DPO goes on from it."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_model, tiny_tokenizer, with_lora
from training.runs import CPU, adapter_weights, make_training, run

from qlora_dpo.cli import main
from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.packing import batch_cost, cut, pack, target_count
from qlora_dpo.errors import Interrupted
from qlora_dpo.models.activation_checkpointing import set_activation_checkpointing
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.lora import trainable_parameters
from qlora_dpo.models.scoring import Scorer, choose_scorer
from qlora_dpo.objectives.supervised import SupervisedObjective
from qlora_dpo.training.loop import fit
from qlora_dpo.training.memory.levels import ConversationLengths
from qlora_dpo.training.records.tracking import read_metrics

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("shared", {}),
    "qwen3": ("shared", {}),
    "mistral": ("shared", {"sliding_window": 4}),
    "gpt2": (
        "shared",
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "gemma2": ("padded", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
}


def conversations(count: int = 24, turns: int = 3, seed: int = 5) -> list[TokenizedConversation]:
    """Random ids in which up to `turns` turns are learned, ending with a learned one."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    made = []
    for place in range(count):
        lengths = [number(1, 7) for _ in range(2 * number(1, turns + 1))]
        borders = [sum(lengths[: end + 1]) for end in range(len(lengths))]
        ids = torch.randint(3, 128, (borders[-1],), generator=generator).tolist()
        made.append(TokenizedConversation(ids, borders, origin=f"made:{place}"))
    return made


def plain_logps(model: Any, samples: list[TokenizedConversation]) -> torch.Tensor:
    """The oracle: one forward per conversation with the model's own logits."""
    logps = []
    for sample in samples:
        logits = model.get_base_model()(input_ids=torch.tensor([sample.ids]), use_cache=False).logits[0].float()
        every = logits[:-1].log_softmax(-1).gather(1, torch.tensor(sample.ids[1:])[:, None])[:, 0]
        logps += [every[start - 1 : end - 1] for start, end in sample.spans]
    return torch.cat(logps)


def gradients(model: Any, logps: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, len(logps))
    return list(torch.autograd.grad((logps * weights).sum(), trainable_parameters(model)))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # peft on gpt2's Conv1D
@pytest.mark.parametrize("lean", [False, True], ids=["own layers", "fused and lean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_forward_per_conversation(family: str, lean: bool) -> None:
    kind, changes = FAMILIES[family]
    model, samples = with_lora(tiny_model(family, **changes)).eval(), conversations(6)
    scorer = choose_scorer(model, samples[0], CPU)
    assert scorer.kind == kind and scorer.head is not None
    plain = plain_logps(model, samples)
    expected = gradients(model, plain)
    if lean:
        fuse_lora(model)
        make_lean(model)
    batch = pack(samples, scorer.kind)
    packed = scorer.per_token_logps(model, batch)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
    for ours, theirs in zip(gradients(model, packed), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7


def test_a_packed_row_has_no_padding_and_leaves_out_last_tokens() -> None:
    samples = conversations(5)
    batch = pack(samples, "shared")
    assert batch.input_ids.shape == (1, sum(len(sample.ids) - 1 for sample in samples))
    assert batch.input_ids.numel() == batch_cost(samples, "shared")
    assert batch.completion_lengths == tuple(map(target_count, samples))
    assert pack(samples, "padded").input_ids.numel() == batch_cost(samples, "padded")
    flat, start = batch.input_ids[0], 0
    for sample in samples:
        assert flat[start : start + len(sample.ids) - 1].tolist() == sample.ids[:-1]
        start += len(sample.ids) - 1


def test_accuracy_is_the_share_of_targets_that_are_likeliest() -> None:
    model, samples = with_lora(tiny_model()).eval(), conversations(12)
    batch = pack(samples, "padded")
    scorer = choose_scorer(model, samples[0], CPU)
    logits = model.get_base_model()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    likeliest = logits.flatten(0, 1)[batch.predictor_index].argmax(-1)
    # Such a random model is right by chance only: make half of the targets right.
    targets = torch.where(torch.arange(len(likeliest)) % 2 == 0, likeliest, batch.target_ids)
    batch = type(batch)(**{**vars(batch), "target_ids": targets})
    for way in (Scorer("padded", scorer.head), Scorer("padded", None)):
        logps, hits = way.per_token_logps_and_hits(model, batch)
        assert torch.equal(hits, likeliest == targets)
        torch.testing.assert_close(logps, way.per_token_logps(model, batch))


def trajectory(folder: Path, *, level: str = "none", kind: str = "shared", **options: Any) -> tuple[list[Any], Any]:
    model, samples = with_lora(tiny_model(), zero=True), conversations()
    set_activation_checkpointing(model, level)  # type: ignore[arg-type]
    scorer = Scorer(kind, choose_scorer(model, samples[0], CPU).head)  # type: ignore[arg-type]
    rows = run(model, samples, folder, steps=8, scorer=scorer, objective=SupervisedObjective(), **options)
    return rows, adapter_weights(model)


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 45}, {"max_tokens": 1}, {"level": "full"}, {"kind": "padded", "max_tokens": 60}],
    ids=str,
)
def test_how_a_step_is_cut_does_not_change_the_trajectory(change: dict[str, Any], tmp_path: Path) -> None:
    expected, expected_weights = trajectory(tmp_path / "whole")
    rows, weights = trajectory(tmp_path / "changed", **change)
    for name in ("loss", "mean_token_accuracy", "supervised_tokens", "eval_loss"):
        ours, theirs = ([row[name] for row in side if name in row] for side in (rows, expected))
        assert ours == pytest.approx(theirs, abs=1e-5) and ours, name
    for ours, theirs in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_budgets_really_cut() -> None:
    step = conversations(4)
    assert [len(cut(step, budget, "shared")) for budget in (10_000, 45, 1)] == [1, 2, 4]


def test_loss_is_the_mean_over_the_supervised_tokens_of_the_whole_step(tmp_path: Path) -> None:
    model, samples = with_lora(tiny_model(), zero=True), conversations(4)
    rows = run(model, samples, tmp_path, steps=1, in_order=True, max_tokens=1, objective=SupervisedObjective())
    expected = plain_logps(with_lora(tiny_model(), zero=True), samples)
    assert rows[0]["loss"] == pytest.approx(-expected.mean().item(), abs=1e-5)
    assert rows[0]["supervised_tokens"] == len(expected)
    assert "conversations_per_second" in rows[0] and "rewards/margins" not in rows[0]


def test_no_reference_is_computed_and_nothing_of_dpo_is_watched(tmp_path: Path) -> None:
    training = make_training(
        with_lora(tiny_model()), conversations(), tmp_path, steps=2, objective=SupervisedObjective()
    )  # a trained start: DPO's first-step check would need the reference here

    def never(_: Any) -> torch.Tensor:
        raise AssertionError("the reference was asked")

    training.engine.reference._score = never  # type: ignore[method-assign]
    fit(training)
    assert not any(name.startswith("displacement") for name in read_metrics(training.run.metrics)[0])


@pytest.mark.parametrize("stop_at", [3, 5])
def test_stopped_and_continued_run_equals_an_unbroken_one(stop_at: int, tmp_path: Path) -> None:
    def model() -> Any:
        return with_lora(tiny_model(), zero=True)

    settings: dict[str, Any] = {
        "steps": 9, "pairs_per_step": 2, "max_tokens": 14, "objective": SupervisedObjective(),
    }  # fmt: skip
    samples = conversations(7)
    unbroken_model = model()
    unbroken = run(unbroken_model, samples, tmp_path / "unbroken", **settings)
    training = make_training(model(), samples, tmp_path / "broken", **settings)
    polls = iter(range(10_000))

    def check() -> None:
        if next(polls) >= 2 * stop_at:
            training.stop.handle(signal.SIGTERM, None)
        type(training.stop).check(training.stop)

    training.stop.check = check  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match="SIGTERM"):
        fit(training)
    continued_model = model()
    continued = run(continued_model, samples, tmp_path / "broken", **settings)
    assert [row["loss"] for row in continued] == [row["loss"] for row in unbroken]
    for ours, expected in zip(adapter_weights(continued_model), adapter_weights(unbroken_model), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", ["shared", "padded"])
def test_made_conversations_cost_what_was_asked(kind: Any) -> None:
    import numpy as np

    lengths = ConversationLengths(np.array([100, 60]), np.array([40, 20]), np.array([30, 30]))
    for tokens in (2, 50, 79, 1000):
        made = lengths.made(tokens, kind)
        assert batch_cost(made, "shared") == tokens
        assert all(0 < sample.spans[0][0] < len(sample.ids) for sample in made)  # type: ignore[union-attr]


STEPS, PER_STEP = 20, 4


def trl_losses(model: Any, samples: list[TokenizedConversation], folder: Path) -> list[float]:
    """Losses that TRL's own trainer logs for a PEFT model, on the same ids and masks, in the given order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    rows = []
    for sample in samples:
        labels = [-100] * len(sample.ids)
        for start, end in sample.spans:
            labels[start:end] = sample.ids[start:end]
        rows.append({"input_ids": sample.ids, "labels": labels})
    trainer = InOrder(
        model=model,
        args=SFTConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0, logging_steps=1,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
            disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
def test_fp32_run_follows_trl(tmp_path: Path) -> None:
    samples = [
        TokenizedConversation([number // 2 + 2 for number in sample.ids], sample.borders)
        for sample in conversations(STEPS * PER_STEP)
    ]  # half of the vocabulary never comes: something to learn
    ours = run(
        with_lora(tiny_model(), zero=True), samples, tmp_path / "ours", steps=STEPS, pairs_per_step=PER_STEP,
        in_order=True, max_tokens=40, learning_rate=1e-2, objective=SupervisedObjective(),
    )  # fmt: skip
    losses = [row["loss"] for row in ours]
    theirs = trl_losses(with_lora(tiny_model(), zero=True), samples, tmp_path / "trl")
    assert len(losses) == len(theirs) == STEPS
    assert max(abs(a - b) for a, b in zip(losses, theirs, strict=True)) < 1e-4
    assert losses[-1] < losses[0] - 0.3  # the run learns something, so agreeing is not trivial


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a template that writes its generation prompt before every answer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    tiny_model().save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ ' w5 ' + message['content'] + eos_token }}"
        "{% else %}{{ ' w4 ' + message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' w5' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations of one to three turns in the words of the tiny tokenizer; answers repeat the question."""
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for number in range(40):
        messages = []
        for turn in range(1 + number % 3):
            text = f"w{40 + number} w{20 + turn}"
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        rows.append({"messages": messages, "category": "ab"[number % 2]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sft(model: Path, data: Path, out: Path, *more: str | Path) -> int:
    arguments = [
        "--objective", "sft", "--model_name_or_path", model, "--dataset", data, "--output_dir", out, "--max_steps",
        "6", "--gradient_accumulation_steps", "4", "--learning_rate", "0.02", "--save_steps", "2", "--lora_r", "4",
        "--eval_fraction", "0.2", "--eval_steps", "3", *more,
    ]  # fmt: skip
    return main(["train", *map(str, arguments)])


@pytest.mark.slow
def test_sft_then_dpo_then_merge(
    chat_model: Path, chats_file: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chain as a user runs it, on one 4-bit base."""
    first, second, merged = tmp_path / "sft", tmp_path / "dpo", tmp_path / "merged"
    assert sft(chat_model, chats_file, first) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "40 conversations from 40 rows (messages)" in said
    assert "32 conversations to train on, 8 held out" in said
    rows = read_metrics(first / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["eval_loss"] < rows[2]["eval_loss"]
    assert {"loss/a", "loss/b", "count/a", "eval_loss/a", "supervised_tokens"} <= rows[2].keys() | rows[-1].keys()
    card = (first / "README.md").read_text()
    assert "supervised fine-tuning" in card and "held-out token accuracy" in card and "beta" not in card
    assert {"checkpoint-4", "checkpoint-6", "training_curves.png", "adapter_model.safetensors"} <= {
        path.name for path in first.iterdir()
    }
    arguments = [
        "--model_name_or_path", chat_model, "--dataset", pairs_file, "--output_dir", second, "--reference_model",
        first, "--max_steps", "3", "--gradient_accumulation_steps", "4", "--learning_rate", "0.02",
    ]  # fmt: skip
    assert main(["train", *map(str, arguments)]) == 0, capsys.readouterr().err
    step = read_metrics(second / "metrics.jsonl")[0]
    assert abs(step["loss"] - math.log(2)) < 1e-6 and step["rewards/margins"] == 0
    assert (second / "checkpoint-3").is_dir()
    assert main(["merge", "--adapter", str(second), "--output", str(merged)]) == 0, capsys.readouterr().err
    check_merged(chat_model, second, merged)


def check_merged(base: Path, adapter: Path, merged: Path) -> None:
    """The merged folder is the dequantized base plus the chain's adapter."""
    from transformers import AutoModelForCausalLM

    from qlora_dpo.training.trained_on import load_trained

    trained, _ = load_trained(adapter, use_cpu=True)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.tensor([[1, 10, 20, 5, 10, 20, 2]])
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids).logits.float().log_softmax(-1) for model in (plain, trained))
        before = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits.float().log_softmax(-1)
    assert (ours - theirs).abs().mean() < 0.05  # bf16
    assert (ours - before).abs().mean() > 0.1


@pytest.mark.slow
def test_same_command_again_continues(chat_model: Path, chats_file: Path, tmp_path: Path) -> None:
    """A run that lost its last checkpoint and its end becomes the same run again."""
    import shutil

    assert sft(chat_model, chats_file, tmp_path / "run") == 0
    expected = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    (tmp_path / "run" / "adapter_model.safetensors").unlink()
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(status | {"status": "training", "step": 4}))
    assert sft(chat_model, chats_file, tmp_path / "run") == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == expected
    assert [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == losses


def test_prompt_and_response_columns(chat_model: Path, tmp_path: Path) -> None:
    rows = [{"question": f"w{number}", "answer": f"w{number} w9"} for number in range(40, 60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--prompt_key", "question", "--response_key", "answer", "--max_length", "64"]
    assert sft(chat_model, file, tmp_path / "run", *more) == 0
    options = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (options["objective"], options["response_key"]) == ("sft", "answer")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--beta", "0.3"], "--beta 0.3 would be ignored: --objective sft does not read it"),
        (["--loss_type", "ipo"], "--loss_type ipo would be ignored"),
        (["--reference_model", "x"], "--reference_model x would be ignored"),
        (["--on_displacement", "stop"], "--on_displacement stop would be ignored"),
        (["--max_prompt_length", "20"], "--max_prompt_length 20 would be ignored"),
        (["--chosen_key", "x"], "--chosen_key x would be ignored"),
        (["--dataset_format", "hh-rlhf"], "is not known for --objective sft; choose auto, messages, plaintext"),
    ],
)
def test_what_sft_would_ignore_is_refused(
    options: list[str], message: str, chat_model: Path, chats_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert sft(chat_model, chats_file, tmp_path / "run", *options) == 2
    assert message in capsys.readouterr().err


def test_what_dpo_would_ignore_is_refused(
    chat_model: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_name_or_path", chat_model, "--dataset", pairs_file, "--messages_key", "chat"]
    assert main(["train", *map(str, arguments)]) == 2
    assert "--messages_key chat would be ignored: --objective dpo does not read it" in capsys.readouterr().err


def test_plan_counts_conversations_and_no_reference(
    chat_model: Path, chats_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["plan", "--objective", "sft", "--model_name_or_path", str(chat_model)]
    assert main([*common, "--dataset", str(chats_file), "--eval_fraction", "0"]) == 0
    said = capsys.readouterr().out
    tokens = sum(len(row) for row in conversation_ids(chat_model, chats_file)) - 40
    assert f"{tokens:,} tokens in the training conversations\n" in said
    assert "for the reference" not in said and "sharing prompts" not in said
    assert main(common) == 0
    assert "Activations of a micro-batch of" in capsys.readouterr().out


def conversation_ids(model: Path, file: Path) -> list[list[int]]:
    """The ids that plain transformers renders."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    return [tokenizer.apply_chat_template(row, tokenize=True)["input_ids"] for row in rows]
