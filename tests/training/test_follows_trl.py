"""The same pairs in the same order from the same LoRA initialization: the per-step losses are TRL's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IdPair, random_pairs, tiny_model, tiny_tokenizer, with_lora
from training.runs import run

from qlora_dpo.models.loading import load_base
from qlora_dpo.models.lora import trainable_parameters

STEPS, PAIRS_PER_STEP, LEARNING_RATE = 30, 4, 1e-2


def pairs() -> list[IdPair]:
    generator = torch.Generator().manual_seed(1)
    lengths = (torch.randint(1, 12, (STEPS * PAIRS_PER_STEP, 3), generator=generator) + 1).tolist()
    rows = random_pairs([tuple(row) for row in lengths], seed=2)
    # Chosen answers use the lower half of the vocabulary and rejected ones the upper: something to learn.
    return [
        replace(
            row,
            chosen_ids=[i // 2 + 2 for i in row.chosen_ids],
            rejected_ids=[i // 2 + 64 for i in row.rejected_ids],
        )
        for row in rows
    ]


def trl_losses(model: Any, rows: list[IdPair], folder: Path) -> list[float]:
    """Losses that TRL's own trainer logs for a PEFT model, on token ids, in the given order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    class OnTokenIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_list([{name: getattr(row, name) for name in columns} for row in rows])
    trainer = OnTokenIds(
        model=model,
        args=DPOConfig(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
            logging_steps=1,
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no",
            remove_unused_columns=False, disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def our_losses(model: Any, rows: list[IdPair], folder: Path) -> list[float]:
    metrics = run(
        model, rows, folder, steps=STEPS, pairs_per_step=PAIRS_PER_STEP, in_order=True, max_tokens=40,
        learning_rate=LEARNING_RATE,
    )  # fmt: skip
    return [row["loss"] for row in metrics]


@pytest.mark.slow
def test_fp32_run_follows_trl(tmp_path: Path) -> None:
    ours = our_losses(with_lora(tiny_model(), zero=True), pairs(), tmp_path / "ours")
    theirs = trl_losses(with_lora(tiny_model(), zero=True), pairs(), tmp_path / "trl")
    assert len(ours) == len(theirs) == STEPS
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert ours[-1] < 0.5  # the run learns something, so agreeing is not trivial


@pytest.mark.slow
def test_nf4_bf16_run_follows_trl(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    quantization = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip

    def base() -> Any:
        return load_base(str(tmp_path / "base"), device=torch.device("cpu"), quantization=quantization)

    ours_model = with_lora(base(), zero=True)
    for parameter in trainable_parameters(ours_model):  # TRL holds the adapter of a quantized base in bf16
        parameter.data = parameter.data.to(torch.bfloat16)
    ours = our_losses(ours_model, pairs(), tmp_path / "ours")
    theirs = trl_losses(with_lora(base(), zero=True), pairs(), tmp_path / "trl")
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 2e-2
    assert ours[-1] < 0.5
