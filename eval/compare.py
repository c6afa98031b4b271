"""`compare`: the answers of a model to the same prompts before (adapter off) and after (adapter on), and verdicts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from eval import prompts as prompt_sources
from eval.answering import Asked, Both, Way, answer_all
from eval.answers import DISPLAYED, FOLDER, SUMMARY, AnswerFile, VerdictFile, check_folder, read_summary, write_summary
from eval.options import CompareOptions, VerdictOptions
from eval.summary import summarize, table
from eval.verdicts import JUDGE, REWARD_MODEL, check_verdicts, give_verdicts
from qlora_dpo.config.labeling import EndpointOptions
from qlora_dpo.config.training import DataOptions, LossOptions, ModelOptions, TrainConfig, quantization_of
from qlora_dpo.environment import versions
from qlora_dpo.errors import ResourceError, UsageError
from qlora_dpo.labeling.generate import render, seed_of
from qlora_dpo.labeling.refused import report_refused
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import choose_device
from qlora_dpo.models.lora import add_frozen_reference, load_adapter
from qlora_dpo.scoring.adapter import ScoredAdapter, check_fit, open_adapter, tokenizer_of
from qlora_dpo.training.folder.content import base_fingerprint, weights_fingerprint
from qlora_dpo.training.policy import load_base_of

LONGEST_PROMPT, LONGEST_ANSWER = 1024, 256  # tokens, for an adapter of no run
_OF_MODEL = {option.name for option in fields(ModelOptions)}


def compare(options: CompareOptions, verdicts: VerdictOptions, server: EndpointOptions, *, model: Any = None) -> None:
    """Answer, judge, count and print; what is there already is not done again. `model` is one that is in memory with
    this adapter; else it is loaded.

    Raises:
        QloraDpoError: one of its kinds, each saying what happened, why, and what to do.
    """
    _check(options)
    check_verdicts(verdicts, server)
    adapter = open_adapter(options.adapter)
    config = config_of(adapter, options)
    check_fit(adapter, config)
    tokenizer = tokenizer_of(adapter, config)
    asked = ask(adapter, options, tokenizer, settings_of(adapter, config, options))
    folder = options.output or default_folder(adapter)
    check_folder(folder, [options.prompts] if options.prompts else [])
    file = AnswerFile(folder, asked.settings)
    _refuse_others(file, asked)
    if missing := sum(one.id not in file.rows for one in asked.prompts):
        print(f"{missing:,} of {len(asked.prompts):,} prompts are to be answered twice; the answers go to {file.path}.")
        device = choose_device(config.model.use_cpu)
        with _memory_errors(device):
            both = model.eval() if model is not None else load_both(adapter, config, device)
            _answer(both, tokenizer, asked, file, options, config.loss.beta)
            del both
    else:
        print(f"All {len(asked.prompts):,} prompts are answered in {file.path}.")
    rows = file.finish([one.id for one in asked.prompts])
    record = VerdictFile(folder)
    noted = _noted(folder) | give_verdicts(rows, record, verdicts, server, folder, use_cpu=options.use_cpu)
    summary = summarize(file.began_with, rows, record.verdicts(), adapter.folder) | noted
    write_summary(folder, summary)
    print("\n".join(table(summary)))
    print(f"\nAll of it is in {folder}. Whether it is good enough: python -m eval gate {folder}")


@dataclass(frozen=True)
class Questions:
    """What is to be answered, and how."""

    prompts: list[Asked]
    settings: dict[str, Any]
    end_id: int


def ask(adapter: ScoredAdapter, options: CompareOptions, tokenizer: Any, settings: dict[str, Any]) -> Questions:
    """The prompts as the model gets them.

    Raises:
        DataError: there are none, or the chat template refuses some.
        StorageError, UsageError: they cannot be found.
    """
    found = prompt_sources.load(options, adapter.settings, tokenizer)
    ids, end_id, refused, truncated = render(
        tokenizer, found.rows, settings["max_prompt_length"], settings["max_new_tokens"]
    )
    report_refused(found.source, refused, len(ids), options.bad_rows)
    if found.chosen:
        print(f"{found.source}: the chosen answers of {found.chosen:,} pairs are the reference answers.")
    rows = [row for row in found.rows if row.number in ids]
    seeds = {row.number: seed_of(options.seed, row.number, 0) for row in rows}
    sampled = set(sorted(seeds, key=seeds.__getitem__)[: options.kl_samples])  # seeds are hashes: any of the rows
    prompts = []
    for row in rows:
        sample_seed = seed_of(options.seed, row.number, 1) if row.number in sampled else None
        asked = Asked("", row, found.facts.get(row.number), ids[row.number], seeds[row.number], sample_seed)
        prompts.append(replace(asked, id=_id_of(asked, settings)))
    source = {
        "source": found.source, "refused": len(refused), "truncated": len(truncated),
        "reference_answers_are_chosen": found.chosen,
    }  # fmt: skip
    return Questions(prompts, settings | {"prompts": source}, end_id)


def settings_of(adapter: ScoredAdapter, config: TrainConfig, options: CompareOptions) -> dict[str, Any]:
    """All that decides what is answered."""
    of_run = config.data.max_length - 1 if config.data.objective == "sft" else config.data.max_prompt_length
    longest = LONGEST_PROMPT if adapter.run is None else of_run
    reference = config.model.reference_model
    has_own = reference not in (None, config.model.model_name_or_path)
    return {
        "model": config.model.model_name_or_path,
        "model_fingerprint": base_fingerprint(config.model),
        "adapter": str(adapter.folder),
        "adapter_fingerprint": weights_fingerprint(adapter.folder),
        "reference_fingerprint": weights_fingerprint(Path(str(reference)).expanduser()) if has_own else None,
        "quantization": quantization_of(config.model),
        "dtype": config.model.dtype,
        "prompt_template": config.data.prompt_template,
        "chat_template_kwargs": config.data.chat_template_kwargs,
        "system_prompt": config.data.system_prompt,
        "beta": config.loss.beta,
        "temperature": options.temperature,
        "max_new_tokens": options.max_new_tokens or adapter.settings.get("max_new_tokens", LONGEST_ANSWER),
        "max_prompt_length": options.max_prompt_length or longest,
        "max_prompts": options.max_prompts,
        "seed": options.seed,
        "kl_samples": options.kl_samples,
        "device": str(choose_device(config.model.use_cpu)),
        "versions": versions(),
    }


def default_folder(adapter: ScoredAdapter) -> Path:
    """In the adapter's folder; of a run's checkpoint beside that, since old ones are deleted with what they hold."""
    if adapter.run is None or adapter.run.path == adapter.folder:
        return adapter.folder / FOLDER
    return adapter.run.path / f"{FOLDER}-{adapter.folder.name}"


def config_of(adapter: ScoredAdapter, options: CompareOptions) -> TrainConfig:
    """Model, tokens and beta as in the adapter's run.

    Raises:
        UsageError: nobody names a base.
    """
    base = options.base_model or adapter.base
    if base is None:
        raise UsageError(f"{adapter.folder} names no base: name it with --base_model.")
    known = adapter.settings | adapter.defaults()
    own = {
        "model_name_or_path": base,
        "model_revision": None if options.base_model else adapter.config.get("revision"),
        "use_cpu": options.use_cpu,
    }
    of_data = (
        "prompt_template",
        "chat_template_kwargs",
        "system_prompt",
        "max_length",
        "max_prompt_length",
        "objective",
    )
    return TrainConfig(
        model=ModelOptions(**{name: value for name, value in adapter.defaults().items() if name in _OF_MODEL} | own),
        data=DataOptions(**{name: known[name] for name in of_data if name in known}),
        loss=LossOptions(beta=float(known.get("beta", LossOptions.beta))),
    )


def load_both(adapter: ScoredAdapter, config: TrainConfig, device: torch.device) -> Any:
    """One quantized base with the adapter, which can be switched off (to the run's frozen reference, if it had one)."""
    model = load_adapter(load_base_of(config.model, device), adapter.folder, trainable=False)
    if config.model.reference_model not in (None, config.model.model_name_or_path):
        add_frozen_reference(model, Path(str(config.model.reference_model)))
    fuse_lora(model)
    make_lean(model)
    return model.eval()


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{device} has too little memory for the model. Free it, or use --use_cpu.") from error


def _answer(
    model: Any, tokenizer: Any, asked: Questions, file: AnswerFile, options: CompareOptions, beta: float
) -> None:
    """Fill the file."""
    way = Way(asked.settings["max_new_tokens"], options.temperature, asked.end_id, beta)
    both = Both(model, tokenizer, way, asked.prompts[0].ids)
    for rows in answer_all(both, asked.prompts, set(file.rows), options.batch_size):
        file.add(*rows)


def _id_of(asked: Asked, settings: dict[str, Any]) -> str:
    """16 hex digits of all that decides the row."""
    row = asked.row
    prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
    content = [prompt, row.category, row.reference_answer, asked.fact, asked.seed, asked.sample_seed]
    compared = {name: value for name, value in settings.items() if name not in DISPLAYED}
    return hashlib.sha256(json.dumps([content, compared], sort_keys=True).encode()).hexdigest()[:16]


def _noted(folder: Path) -> dict[str, Any]:
    """What an earlier summary says about those who gave verdicts then."""
    if not (folder / SUMMARY).is_file():
        return {}
    return {name: value for name, value in read_summary(folder).items() if name in (REWARD_MODEL, JUDGE)}


def _refuse_others(file: AnswerFile, asked: Questions) -> None:
    """Raises UsageError where the file answers prompts that are not asked now."""
    known = {one.id for one in asked.prompts}
    others = [row for id_, row in file.rows.items() if id_ not in known]
    if others:
        raise UsageError(
            f"{file.path} answers {len(others):,} prompts that are not in {asked.settings['prompts']['source']} now, "
            f"such as that of {others[0].origin}. Name the prompts that it was begun with, or another --output."
        )


def _check(options: CompareOptions) -> None:
    """Refuse numbers that cannot work."""
    above_zero = ("max_new_tokens", "batch_size", "max_prompts", "max_prompt_length")
    values = {name: getattr(options, name) for name in above_zero}
    problems = [
        f"--{name} {value}: must be above 0." for name, value in values.items() if value is not None and value < 1
    ]
    if options.max_prompt_length == 1:
        problems.append("--max_prompt_length 1: must be at least 2.")
    if not 0 <= options.temperature < math.inf:
        problems.append(f"--temperature {options.temperature}: must be at least 0.")
    if options.kl_samples < 0:
        problems.append(f"--kl_samples {options.kl_samples}: must be at least 0.")
    if problems:
        raise UsageError("\n".join(problems))
