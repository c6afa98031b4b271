"""The embedded demo: a tiny base model learns to explain its answers, the way a real run would.

It makes preference pairs from the base's own answers, trains on them with `train` like anybody's pairs, and asks the
held-out questions before and after.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.config.training import TrainConfig, TrainingOptions, quantization_of
from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.demo.base_model import BASE
from qlora_dpo.demo.world import Question, held_out_questions, is_explained, states_fact, training_questions
from qlora_dpo.errors import UsageError
from qlora_dpo.models.generation import generate
from qlora_dpo.models.loading import choose_device, load_base, load_tokenizer
from qlora_dpo.models.lora import add_adapter
from qlora_dpo.training.folder.run_folder import RunFolder, write_atomically
from qlora_dpo.training.parallel.launching import is_launched
from qlora_dpo.training.policy import pair_tokenizer
from qlora_dpo.training.records.tracking import read_metrics
from qlora_dpo.training.train import Trained, open_run, train, train_in
from qlora_dpo.training.trained_on import load_trained

RESULT = "before_after.json"
SHOWN = 8

# Where the demo differs from the defaults of real training: a tiny model needs larger steps and shorter texts.
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {},
    "lora": {"lora_r": 16, "lora_alpha": 32},
    "data": {"max_length": 192, "max_prompt_length": 96},
    "store": {},
    "loss": {},
    "training": {
        "output_dir": Path("runs/demo"),
        "learning_rate": 3e-4,
        "gradient_accumulation_steps": 8,
        "max_steps": 60,
        "activation_checkpointing": "none",
        "save_steps": 20,
        "eval_steps": 20,
        "max_new_tokens": 64,
    },
}


@dataclass(frozen=True)
class Answered:
    """A held-out question with the answers before and after."""

    question: Question
    before: str
    after: str


def run_training(config: TrainConfig) -> None:
    """The `train` command: the demo where neither a model nor data is named."""
    if config.is_demo:
        run_demo(config)
    else:
        train(config)


def run_demo(config: TrainConfig) -> Trained | None:
    """Run the demo (or continue it) and print its table; returns None where it had finished before."""
    if is_launched():
        raise UsageError("the embedded demo runs in one process: start it without a launcher, or name your own data.")
    config, trained = demo_config(config), None
    with open_run(config) as run:
        if not run.has_nothing_to_do:
            print("The embedded demo: a tiny base model, quantized to 4 bit, learns from preference pairs to explain")
            print("its answers. Your own model and pairs: ./run_dpo_training.sh --model_name_or_path M --dataset D\n")
            make_pairs(config)
        if not (run.has_nothing_to_do and (run.path / RESULT).is_file()):
            trained = train_in(run, config, choose_device(config.model.use_cpu)) or load_again(run, config)
            record(run, ask(trained, config))
        print_result(run, json.loads((run.path / RESULT).read_text(encoding="utf-8")))
    return trained


def load_again(run: RunFolder, config: TrainConfig) -> Trained:
    """The adapter of a run that was stopped between the last step and the questions."""
    model, tokenizer = load_trained(run.path, use_cpu=config.model.use_cpu)
    return Trained(run, model, tokenizer, pair_tokenizer(config, tokenizer))


def demo_config(config: TrainConfig) -> TrainConfig:
    """The demo's settings where the command line did not say otherwise, on its own base and pairs."""
    defaults = TrainConfig()
    groups = {}
    for name, settings in SETTINGS.items():
        group, default = getattr(config, name), getattr(defaults, name)
        unset = {key: value for key, value in settings.items() if getattr(group, key) == getattr(default, key)}
        groups[name] = replace(group, **unset)
    config = TrainConfig(**groups)
    pairs = output_dir(config) / "pairs"
    return replace(
        config,
        model=replace(config.model, model_name_or_path=str(BASE)),
        data=replace(config.data, dataset=str(pairs / "train.jsonl"), eval_dataset=str(pairs / "held_out.jsonl")),
    )


def output_dir(config: TrainConfig) -> Path:
    """The demo's run folder."""
    assert config.training.output_dir is not None
    return config.training.output_dir


def make_pairs(config: TrainConfig) -> None:
    """Write the pairs files: the reference answer as chosen, the quantized base's own answer as rejected."""
    files = {
        Path(str(config.data.dataset)): training_questions(),
        Path(str(config.data.eval_dataset)): held_out_questions(),
    }
    if all(file.is_file() for file in files):
        return
    device = choose_device(config.model.use_cpu)
    tokenizer = load_tokenizer(str(BASE))
    dtype = torch.float32 if config.model.dtype == "float32" else torch.bfloat16
    base = load_base(str(BASE), device=device, quantization=quantization_of(config.model), dtype=dtype)
    model = add_adapter(base, r=1, alpha=1, dropout=0.0, target_modules=["all-linear"], seed=0)  # untrained: the base
    prompts = PairTokenizer(tokenizer, config.data.max_length, config.data.max_prompt_length)
    for file, questions in files.items():
        print(
            f"Asking the base {len(questions)} questions; its own answers become `rejected` in {file}.",
            file=sys.stderr,
        )
        answers = answer(model, tokenizer, prompts, questions, config.training, use_reference=True)
        rows = [
            {
                "prompt": question.prompt,
                "chosen": question.explained,
                "rejected": own,
                "category": question.category,
                "fact": question.fact,
            }
            for question, own in zip(questions, answers, strict=True)
            if own and own != question.explained
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def ask(trained: Trained, config: TrainConfig) -> list[Answered]:
    """The held-out questions, adapter off and on."""
    questions = held_out_questions()
    before, after = (
        answer(
            trained.model,
            trained.tokenizer,
            trained.pair_tokenizer,
            questions,
            config.training,
            use_reference=off,
        )
        for off in (True, False)
    )
    return [Answered(*row) for row in zip(questions, before, after, strict=True)]


def answer(
    model: Any, tokenizer: Any, prompts: PairTokenizer, questions: Sequence[Question], options: TrainingOptions,
    *, use_reference: bool,
) -> list[str]:  # fmt: skip
    """Greedy answers to the questions."""
    ids = [prompts.render_prompt_ids(question.prompt) for question in questions]
    return generate(
        model, tokenizer, ids, max_new_tokens=options.max_new_tokens, end_token_ids=[prompts.end_id],
        use_reference=use_reference, batch_size=128,
    )  # fmt: skip


def record(run: RunFolder, answered: Sequence[Answered]) -> None:
    """Write before_after.json: the numbers and every answer."""
    terse = [row for row in answered if not is_explained(row.before, row.question)]
    known = [row for row in answered if states_fact(row.before, row.question)]
    result = {
        "questions": len(answered),
        "terse_before": len(terse),
        "explained_after": sum(is_explained(row.after, row.question) for row in terse),
        "right_before": len(known),
        "still_right_after": sum(states_fact(row.after, row.question) for row in known),
        "reward_accuracy": read_metrics(run.metrics)[-1]["eval_rewards/accuracies"],
        "answers": [asdict(row.question) | {"before": row.before, "after": row.after} for row in answered],
    }
    write_atomically(run.path / RESULT, json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def print_result(run: RunFolder, result: dict[str, Any]) -> None:
    """Print the table of answers with verdicts, the three numbers, and what to do next."""
    rows = [
        (row["prompt"], row["before"], row["after"], verdict(row))
        for row in result["answers"][:: max(1, len(result["answers"]) // SHOWN)][:SHOWN]
    ]
    print("\nHeld-out questions (never trained on):")
    for prompt, before, after, judged in rows:
        print(f"\n  {prompt}\n    before  {before}\n    after   {after}\n            {judged}")
    print(
        f"\nHeld-out reward accuracy       {result['reward_accuracy']:.3f}\n"
        f"From terse to explained        {share(result['explained_after'], result['terse_before'])}\n"
        f"Facts right before and after   {share(result['still_right_after'], result['right_before'])}\n"
        f"\nThe run is in {run.path}: curves, adapter, card, every answer. Next:\n"
        f"  python -m eval app --adapter {run.path}                            # compare in the browser\n"
        f"  python -m qlora_dpo merge --adapter {run.path} --output {run.path}-merged\n"
        "  ./run_dpo_training.sh --model_name_or_path MODEL --dataset PAIRS.jsonl"
    )


def verdict(row: dict[str, Any]) -> str:
    """What changed, in words."""
    question = Question(**{name: row[name] for name in Question.__dataclass_fields__})
    style = "explained" if is_explained(row["after"], question) else "not explained"
    right_before, right_after = states_fact(row["before"], question), states_fact(row["after"], question)
    facts = {
        (True, True): "fact kept",
        (True, False): "fact lost",
        (False, True): "fact gained",
        (False, False): "wrong before and after",
    }
    return f"[{style}; {facts[right_before, right_after]}]"


def share(part: int, whole: int) -> str:
    """`57 of 60 (95 %)`."""
    return f"{part} of {whole} ({100 * part / max(whole, 1):.0f} %)"
