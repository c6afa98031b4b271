"""Labels by a reward model: scores as the model's own, batches that change nothing, a run that goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.errors import ModelError, UsageError
from qlora_dpo.labeling import reward_model
from qlora_dpo.labeling.records import Candidates
from qlora_dpo.labeling.reward_scorer import RewardScorer, load_reward_scorer

PROMPTS: list[Any] = ["w7", "w8 w9 w10", ({"role": "user", "content": "w11"},)]
ANSWERS = [("w20", "w21 w22 w23", "w24"), ("w25 w26", "w27"), ("w28", "w29 w40 w41 w42")]


def reward_model_at(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A tiny reward model, saved as a user would have it."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = tiny_config(num_labels=changes.pop("num_labels", 1), **changes)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model_at(tmp_path_factory.mktemp("reward") / "tiny-reward")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> RewardScorer:
    return load_reward_scorer(str(folder), use_cpu=True)[0]


@pytest.fixture
def candidates_file(tmp_path: Path) -> Path:
    rows = [{"prompt": prompt, "answers": answers} for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)]
    file = tmp_path / "candidates.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def encoded(scorer: RewardScorer) -> list[list[int]]:
    return [scorer.encode(p, answer) for p, answers in zip(PROMPTS, ANSWERS, strict=True) for answer in answers]


def test_a_conversation_is_what_the_chat_template_writes(scorer: RewardScorer) -> None:
    tokenizer = tiny_tokenizer()
    for prompt, answers in zip(PROMPTS, ANSWERS, strict=True):
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        for answer in answers:
            whole = [*messages, {"role": "assistant", "content": answer}]
            assert scorer.encode(prompt, answer) == tokenizer.apply_chat_template(whole, return_dict=False)


def test_control_tokens_in_an_answer_stay_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["<unk>", *(f"w{number}" for number in range(1, 50))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<p>")
    tokenizer.chat_template = tiny_tokenizer().chat_template
    model = SimpleNamespace(config=tiny_config())
    scorer = RewardScorer(model, tokenizer, 100, torch.device("cpu"))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert scorer.encode("w7 </s>", "w8 </s> <s> w9") == [begin, 7, 0, 5, 8, 0, 0, 9, end]


def test_scores_are_the_models_own_in_any_batch(folder: Path, scorer: RewardScorer) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits.item() for ids in encoded(scorer)]
    assert len({round(score, 4) for score in expected}) == len(expected)
    for batch_size in (1, 2, 100):
        assert scorer.score(encoded(scorer), batch_size) == pytest.approx(expected, abs=1e-5)


def test_what_is_too_long_loses_its_beginning(folder: Path) -> None:
    scorer, _ = load_reward_scorer(str(folder), use_cpu=True, max_length=4)
    assert scorer.encode("w7", "w8") == [1, 5, 8, 2]
    assert scorer.encode("w7 w8", "w9 w10") == [1, 9, 10, 2]
    assert scorer.truncated == 2
    assert load_reward_scorer(str(folder), use_cpu=True, max_length=4000)[0].max_length == 256  # of the model


def test_confidence_is_bradley_terry() -> None:
    item = Candidates("p", ("a", "b", "c"))
    verdict = reward_model.decide(item, [0.5, -1.5, 0.0], 0.0, "v")
    assert (verdict.chosen, verdict.rejected, verdict.scores) == (0, 1, (0.5, -1.5, 0.0))
    assert verdict.confidence == pytest.approx(1 / (1 + math.exp(-2)))
    assert reward_model.decide(item, [900.0, 0.0, 0.0], 0.0, "v").confidence == 1
    assert reward_model.decide(item, [0.5, -1.5, 0.0], 2.5, "v").is_tie
    assert reward_model.decide(item, [0.5, 0.5, 0.5], 0.0, "v").is_tie
    with pytest.raises(ModelError, match="not numbers"):
        reward_model.decide(item, [0.5, float("nan"), 0.0], 0.0, "v")


def command(candidates: Path, folder: Path, *more: str) -> list[str]:
    output = candidates.with_name("pairs.jsonl")
    arguments = ["--candidates", str(candidates), "--reward_model", str(folder), "--output", str(output), "--use_cpu"]
    return ["label", "reward_model", *arguments, *more]


def test_the_command_labels_and_goes_on(
    candidates_file: Path, folder: Path, scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    original = RewardScorer.score
    monkeypatch.setattr(
        RewardScorer, "score", lambda self, texts, size: scored.append(len(texts)) or original(self, texts, size)
    )
    assert main(command(candidates_file, folder, "--batch_size", "2")) == 0
    pairs = [json.loads(line) for line in candidates_file.with_name("pairs.jsonl").read_text().splitlines()]
    for pair, prompt, answers in zip(pairs, PROMPTS, ANSWERS, strict=True):
        rewards = original(scorer, [scorer.encode(prompt, answer) for answer in answers], 8)
        assert pair["chosen"] == answers[rewards.index(max(rewards))]
        assert pair["rejected"] == answers[rewards.index(min(rewards))]
        assert pair["label"]["scores"] == pytest.approx(rewards, abs=1e-5)
        assert pair["confidence"] == pytest.approx(1 / (1 + math.exp(min(rewards) - max(rewards))), abs=1e-5)
        assert pair["label"]["version"].startswith("tiny-reward ")
    assert sum(scored) == 7

    scored.clear()
    assert main(command(candidates_file, folder, "--batch_size", "2")) == 0
    assert scored == []
    record = candidates_file.with_name("pairs.labels.jsonl")
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(lines[:2]) + lines[2][:50])  # as a kill leaves it
    assert main(command(candidates_file, folder, "--batch_size", "2")) == 0
    assert sum(scored) == len(json.loads(lines[2])["scores"])


def test_other_weights_or_another_margin_are_another_version(
    candidates_file: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(candidates_file, folder)) == 0
    assert main(command(candidates_file, folder, "--min_margin", "1000")) == 0
    assert "0 pairs, 3 ties of 3" in capsys.readouterr().out
    assert main(command(candidates_file, reward_model_at(tmp_path / "tiny-reward", seed=1))) == 0
    record = candidates_file.with_name("pairs.labels.jsonl")
    versions = [json.loads(line)["version"] for line in record.read_text().splitlines()]
    assert [versions.count(version) for version in dict.fromkeys(versions)] == [3, 3, 3]


@pytest.mark.slow
def test_in_4_bit_the_head_stays_as_it_is(candidates_file: Path, folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    scorer, version = load_reward_scorer(str(folder), use_cpu=True, load_in_4bit=True)
    layers = {name: module for name, module in scorer._model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 14 and not any("score" in name for name in layers)
    whole, other = load_reward_scorer(str(folder), use_cpu=True)
    assert version != other
    exact, rounded = (torch.tensor(s.score(encoded(s), 4)) for s in (whole, scorer))
    assert 0 < (exact - rounded).abs().max() and torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.9
    assert main(command(candidates_file, folder, "--load_in_4bit")) == 0


def test_what_is_no_reward_model_is_refused(
    tmp_path: Path, model_folder: Path, candidates_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(candidates_file, model_folder)) == 65
    assert "has 2 outputs" in capsys.readouterr().err
    causal = tmp_path / "causal"
    causal.mkdir()
    for file in model_folder.iterdir():
        (causal / file.name).write_bytes(file.read_bytes())
    config = json.loads((causal / "config.json").read_text())
    (causal / "config.json").write_text(json.dumps(config | {"num_labels": 1, "id2label": {"0": "LABEL_0"}}))
    assert main(command(candidates_file, causal)) == 65
    assert "its weights lack score.weight" in capsys.readouterr().err
    assert main(command(candidates_file, tmp_path / "none")) == 74
    for option in ("--batch_size", "--max_length"):
        assert main(command(candidates_file, model_folder, option, "0")) == 2
    assert main(command(candidates_file, model_folder, "--min_margin", "-1")) == 2


def test_a_narrow_model_is_refused_in_4_bit_on_a_cpu(tmp_path: Path) -> None:
    narrow = reward_model_at(tmp_path / "narrow", hidden_size=96, head_dim=24)
    with pytest.raises(UsageError, match="96 input features"):
        load_reward_scorer(str(narrow), use_cpu=True, load_in_4bit=True)


def test_what_the_template_refuses_is_named(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = tmp_path / "strict"
    strict.mkdir()
    for file in folder.iterdir():
        (strict / file.name).write_bytes(file.read_bytes())
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ message['content'] }} {{ eos_token }}{% endfor %}"
    )
    tokenizer.save_pretrained(strict)
    rows = [
        {"prompt": "w7", "answers": ["w8", "w9"]},
        {"prompt": [{"role": "system", "content": "w7"}, {"role": "user", "content": "w8"}], "answers": ["w8", "w9"]},
    ]
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(command(file, strict)) == 65
    assert "c.jsonl:2: prompt: the chat template refuses it (no system)" in capsys.readouterr().err
    assert main(command(file, strict, "--bad_rows", "skip")) == 0
    told = capsys.readouterr().out
    assert "c.jsonl:2" in told and "1 pairs, 0 ties, 1 without a verdict of 2" in told


def test_real_rows(shared_data: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (shared_data / "belle_pairs_hh.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    file = tmp_path / "c.jsonl"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert main(command(file, folder, "--bad_rows", "skip")) == 0
    assert "sets of answers" in capsys.readouterr().out
