"""What the options of a run mean for several processes."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from qlora_dpo.config.training import TrainConfig
from qlora_dpo.errors import UsageError
from qlora_dpo.training.engine import Engine
from qlora_dpo.training.folder.run_folder import RunFolder
from qlora_dpo.training.parallel.ranks import Ranks


def pairs_of_a_step(config: TrainConfig, run: RunFolder, engine: Engine) -> int:
    """Pairs of one optimizer step: those that the options say for each process, or in a run that goes on, unless that
    was allowed to change, those that it began with, whatever the number of processes is now.

    Raises:
        UsageError: a process would have none of them.
    """
    processes = engine.ranks.count
    asked = config.pairs_per_step * processes
    if {change.name for change in run.changes} & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        return asked
    kept = int(run.status().get("pairs_per_step", asked))
    most = len(engine.groups(range(kept)))
    if most < processes:
        raise UsageError(
            f"The run in {run.path} has steps of {kept} {engine.method.unit}, of which {processes} processes would not "
            f"all get some. Continue it with 1 to {most}, or allow another step: --gradient_accumulation_steps N "
            "--allow_changed gradient_accumulation_steps."
        )
    if kept != asked:
        print(
            f"The run began with steps of {kept} {engine.method.unit} and keeps them: about {kept / processes:g} for "
            f"each of {processes} process{'es' if processes > 1 else ''}, balanced by tokens.",
            file=sys.stderr,
        )
    return kept


def refuse_unshardable(config: TrainConfig, ranks: Ranks) -> None:
    """Refuse what cannot be done with a base that is sharded.

    Raises:
        UsageError: naming the option, or the package that is missing.
    """
    if ranks.is_zero3 and find_spec("deepspeed") is None:
        raise UsageError("the launcher's config asks for DeepSpeed, which is not installed: pip install deepspeed.")
    model, options, lora = config.model, config.training, config.lora
    problems = (
        (model.load_in_8bit, "--load_in_8bit: bitsandbytes' 8-bit layers cannot be sharded; use 4 bit"),
        (
            ranks.shards_adapter and model.reference_model not in (None, model.model_name_or_path),
            "--reference_model: two adapters are switched by module, which sharding forbids; merge it into the base",
        ),
        (bool(lora.modules_to_save), "--modules_to_save: whole modules are not sharded as an adapter is; leave it out"),
        (lora.use_dora, "--use_dora: it forms a layer's whole weight in PEFT's own forward; train without it"),
        (
            ranks.shards_adapter and lora.loraplus_lr_ratio != 1,
            "--loraplus_lr_ratio: sharded moments are kept in one group; leave it at 1",
        ),
        (options.sample_generate, "--sample_generate: one process cannot generate alone; use `python -m eval compare`"),
        (
            ranks.shards_adapter and options.optim not in ("auto", "adamw_torch"),
            f"--optim {options.optim}: bitsandbytes' optimizers do not know sharded weights; adamw_torch is sharded "
            "itself",
        ),
    )
    for is_asked, problem in problems:
        if is_asked:
            raise UsageError(f"With {'ZeRO-3' if ranks.is_zero3 else 'FSDP'} there is no {problem}.")
