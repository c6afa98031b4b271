"""TRL's DPOTrainer at the real size: the quantized base is handed over as an object, the pairs as token ids.

TRL puts the adapter on itself: given a model that has one it would keep a frozen copy of it as the reference.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Any
from uuid import uuid4

from benchmarks.gpu.child import synchronize
from benchmarks.gpu.lengths import seed_rows
from benchmarks.gpu.ours import built, peak_memory_gib, reset_peak, unshared
from benchmarks.gpu.rows import NOT_INSTALLED, Row
from benchmarks.gpu.scale import SCALES, SEED, Scale
from benchmarks.run_trl import TrlForm, _clock, _tokenizer, _trainer_class


def measure_trl(scale_name: str, model: str, form: dict[str, Any]) -> Iterator[Row]:
    """Train as many steps as ours on the same pairs."""
    scale, chosen = SCALES[scale_name], TrlForm(**form)
    name = f"{model}: {chosen}"
    if importlib.util.find_spec("trl") is None:
        yield Row("speed", name, note=NOT_INSTALLED)
        return
    base, row = built(model, scale)
    yield row
    yield Row("speed", name, run_trainer(base, scale, model, chosen))


def run_trainer(base: Any, scale: Scale, model: str, form: TrlForm) -> dict[str, Any]:
    """Seconds of the counted steps, of the reference's pass, the losses and the peak."""
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl.trainer import dpo_trainer

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    # It would hash the whole model for the name of its cache, which takes long and is not what is measured.
    dpo_trainer.hash_module = lambda _: uuid4().hex
    rows = seed_rows(scale, model, (scale.steps + 1) * scale.pairs_per_step)
    clock, on_gpu = _clock(), torch.cuda.is_available()
    torch.manual_seed(SEED)
    reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer_class()(
            model=base,
            args=arguments(scale, form, folder, on_gpu),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=_tokenizer(),
            callbacks=[clock],
            peft_config=LoraConfig(
                r=scale.rank, lora_alpha=scale.rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    synchronize()
    seconds = [after - before for before, after in pairwise(clock.stamps)][1:]
    counted = range(scale.pairs_per_step, len(rows))
    pairs = [_Pair(row) for row in rows]
    return {
        "form": asdict(form),
        "seconds": seconds,
        "pairs_per_second": scale.pairs_per_step / statistics.median(seconds),
        "tokens_per_second": unshared(pairs, counted) / scale.steps / statistics.median(seconds),
        "reference_seconds": trainer.reference_seconds * scale.pairs_per_step / len(rows),
        "peak_gib": peak_memory_gib(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "adapter_dtype": str(next(p.dtype for p in trainer.model.parameters() if p.requires_grad)),
        "pairs_per_step": scale.pairs_per_step,
    }


class _Pair:
    """A row's ids as attributes."""

    def __init__(self, row: dict[str, list[int]]) -> None:
        self.prompt_ids, self.chosen_ids, self.rejected_ids = (
            row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )


def arguments(scale: Scale, form: TrlForm, folder: str, on_gpu: bool) -> Any:
    """DPOConfig for speed: everything is in bf16 already, and autocast would only add casts."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=folder,
        max_steps=scale.steps + 1,
        per_device_train_batch_size=form.batch,
        gradient_accumulation_steps=scale.pairs_per_step // form.batch,
        precompute_ref_log_probs=form.precompute,
        gradient_checkpointing=form.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if form.checkpointing else None,
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        logging_steps=1,
        max_length=4096,
        report_to="none",
        use_cpu=not on_gpu,
        bf16=False,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=SEED,
    )
