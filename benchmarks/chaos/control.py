"""The control: the same kills against `transformers.Trainer`, whose own resuming must be seen to fail.

A suite that cannot fail proves nothing. The Trainer writes its checkpoints in place and resumes from the folder with
the highest number without looking whether it is whole.
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.bench import Bench, Row, last_line, log_of
from benchmarks.chaos.victims import Victim, fork_function
from benchmarks.chaos.watching import Crash, Trace, read_trace
from benchmarks.chaos.workload import SAVE_STEPS, SHAPE, STEPS, adapter_digest


@dataclass(frozen=True)
class StockRun:
    """A LoRA adapter on a tiny LLaMA, trained by the Trainer; continues from what its own resuming finds."""

    folder: Path
    seed: int

    def __call__(self) -> int:
        import transformers
        from transformers import Trainer, TrainingArguments

        transformers.logging.set_verbosity_error()
        arguments = TrainingArguments(
            output_dir=str(self.folder), max_steps=STEPS, save_steps=SAVE_STEPS, save_total_limit=2, logging_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=0.01, seed=self.seed,
            report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="steps",
        )  # fmt: skip
        model = self._model()
        trainer = Trainer(model=model, args=arguments, train_dataset=self._rows())
        trainer.train(resume_from_checkpoint=any(self.folder.glob("checkpoint-*")) or None)
        model.save_pretrained(self.folder / "final")
        return 0

    def _model(self) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(self.seed)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=128, **SHAPE))
        lora = LoraConfig(r=4, lora_alpha=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(base, lora)

    def _rows(self) -> list[dict[str, list[int]]]:
        rng = random.Random(self.seed)
        rows = [[rng.randrange(3, 128) for _ in range(16)] for _ in range(24)]
        return [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in rows]


def control_rows(bench: Bench, count: int) -> list[Row]:
    """Kill the Trainer at changes of its folder while it saves, and at as many random moments."""
    row = Row(
        "control",
        "The same kills against `transformers.Trainer` with `resume_from_checkpoint=True` are seen to fail.",
        needs_failures=True,
    )
    expected, seconds = unbroken(bench)
    with bench.scratch() as run:
        stock(bench, run, [Trace(run, run.with_name("trace"))]).wait()
        events = [event for event in read_trace(run.with_name("trace")) if f"checkpoint-{2 * SAVE_STEPS}" in event.path]
    rng = bench.rng("control")
    for event in rng.sample(events, min(count, len(events))):
        with bench.scratch() as run:
            stock(bench, run, [Crash(run, event.number)]).wait()
            row.add(resumed(bench, run, expected), f"killed before {event.name} {event.path}")
    in_saves = row.trials - row.passed
    for _ in range(count):
        moment = rng.uniform(0, seconds)
        with bench.scratch() as run:
            victim = stock(bench, run, [])
            if victim.wait(moment) is None:
                victim.send(signal.SIGKILL)
                victim.wait()
            row.add(resumed(bench, run, expected), f"killed after {moment:.2f} s")
    failed = row.trials - row.passed
    row.worst = f"{in_saves} of {min(count, len(events))} kills in a save and {failed - in_saves} of {count} at random "
    row.worst += "moments ended in an error or with another adapter"
    return [row]


def unbroken(bench: Bench) -> tuple[str, float]:
    """(digest of the Trainer's adapter, seconds of a run); two undisturbed runs must agree, or nothing is shown."""
    digests, started = [], time.perf_counter()
    for _ in range(2):
        with bench.scratch() as run:
            victim = stock(bench, run, [])
            if victim.wait() != 0:
                raise RuntimeError(f"the undisturbed Trainer failed: {victim.said()[-2000:]}")
            digests.append(adapter_digest(run / "final" / "adapter_model.safetensors"))
    if digests[0] != digests[1]:
        raise RuntimeError("two undisturbed runs of the Trainer differ")
    return digests[0], (time.perf_counter() - started) / 2


def stock(bench: Bench, run: Path, before: list[Crash] | list[Trace]) -> Victim:
    """Start the Trainer on a folder."""
    return fork_function(StockRun(run, bench.seed), log_of(run), {}, before)


def resumed(bench: Bench, run: Path, expected: str) -> list[str]:
    """Let the Trainer resume; what is not as in its unbroken run."""
    victim = stock(bench, run, [])
    if victim.wait() != 0:
        return [f"resuming fails: {last_line(victim.said())[:200]}"]
    return [] if adapter_digest(run / "final" / "adapter_model.safetensors") == expected else ["another adapter"]
