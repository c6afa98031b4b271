"""TRL's DPOTrainer on a task: the same token ids in the same order, from the same policy."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.processes import peak_gib
from benchmarks.programs import LEARNING_RATE, Run, Task, load_policy, record


@dataclass(frozen=True)
class TrlForm:
    """How DPOTrainer is set."""

    batch: int = 1
    precompute: bool = False
    checkpointing: bool = False

    def __str__(self) -> str:
        reference = "precomputed" if self.precompute else "inline"
        return f"TRL, batch {self.batch}, reference {reference}, {'' if self.checkpointing else 'no '}checkpointing"


def run_trl(task: Task, form: TrlForm) -> Run:
    """Train on the task's pairs in their order."""
    import datasets
    import transformers
    from transformers.trainer_callback import PrinterCallback

    assert task.pairs_per_step % form.batch == 0, (
        f"a step of {task.pairs_per_step} pairs has no batches of {form.batch}"
    )
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # that it takes over the tokenizer's pad token
    policy = load_policy(task)
    loaded_gib = peak_gib()
    clock = _clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer_class()(
            model=policy,
            args=_arguments(task, form, folder),
            train_dataset=datasets.Dataset.from_list(task.rows()),
            processing_class=_tokenizer(),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return record(task, losses, clock.stamps, trainer.reference_seconds, loaded_gib)


def _trainer_class() -> Any:
    """DPOTrainer that takes token ids as they come, in order, and times its pass over the reference."""
    from torch.utils.data import SequentialSampler
    from trl import DPOTrainer

    class OnTokenIds(DPOTrainer):
        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_args: Any, **_kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            pairs: Any = self.train_dataset if dataset is None else dataset
            return SequentialSampler(pairs)

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = time.perf_counter() - started
            return result

    return OnTokenIds


def _clock() -> Any:
    """A callback with the times at which the first step began and every step ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
            self.stamps = self.stamps or [time.perf_counter()]

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            self.stamps.append(time.perf_counter())

    return Clock()


def _arguments(task: Task, form: TrlForm, folder: str) -> Any:
    from trl import DPOConfig

    return DPOConfig(
        output_dir=folder,
        max_steps=task.all_steps,
        per_device_train_batch_size=form.batch,
        gradient_accumulation_steps=task.pairs_per_step // form.batch,
        precompute_ref_log_probs=form.precompute,
        gradient_checkpointing=form.checkpointing,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        logging_steps=1,
        max_length=4096,
        report_to="none",
        use_cpu=True,
        bf16=False,  # the base is bf16 already; autocast would only add casts
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )


def _tokenizer() -> Any:
    """TRL asks for a tokenizer, and reads its pad token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
