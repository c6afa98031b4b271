"""The card (README.md) of what is released, written from what the folder and its run tell.

Every section is left out where there is nothing to say. Texts that models or data sets wrote stand in code blocks, so
that nothing in them becomes a link, a picture or markup.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_dpo import __version__
from qlora_dpo.release.cards.records import Records, read_records
from qlora_dpo.release.cards.sections import SECTIONS, Facts, verdicts_of, without_paths
from qlora_dpo.training.folder.run_folder import CARD, CURVES, write_atomically
from qlora_dpo.training.records.markdown import inline
from qlora_dpo.training.records.model_card import METHODS, is_hub_id
from qlora_dpo.training.records.seal import UNSEALED, is_edited, sealed

_WHAT = {
    "adapter": ("peft", "adapter", "LoRA adapter for {base}"),
    "merged": ("transformers", "finetune", "{base} with a LoRA adapter merged into it"),
    "gguf": ("gguf", "quantized", "GGUF files of {base} with a LoRA adapter merged into it"),
}

_PAIRS = "preference-pairs"  # where the Hub wants the id of a data set


def write_card(folder: Path, name: str, run: Path | None = None) -> None:
    """Write README.md of a folder that may be released, unless a person wrote one; `run` is where it comes from.

    Raises:
        StorageError, UsageError: see `read_records`.
    """
    file = folder / CARD
    if is_edited(file):
        return
    records = read_records(folder, run)
    base = records.base if records.base and is_hub_id(records.base) else None
    facts = Facts(name, base, {}, hub_datasets(records), has_curves=(folder / CURVES).is_file())
    write_atomically(file, card_of(records, facts))


def card_of(records: Records, facts: Facts) -> str:
    """The whole text of the card, with its seal."""
    from huggingface_hub import ModelCard

    parts = [
        f"---\n{metadata_of(records, facts).to_yaml()}\n---\n{UNSEALED}\n\n# {facts.name}",
        *_opening(records, facts),
    ]
    for title, section in SECTIONS.items():
        if lines := section(records, facts):
            parts.append(f"## {title}\n\n" + "\n".join(lines))
    text = "\n\n".join(parts) + "\n"
    ModelCard(text)  # reads its own metadata, as the Hub will
    return sealed(text)


def metadata_of(records: Records, facts: Facts) -> Any:
    """The card's metadata as the Hub reads it: huggingface_hub's ModelCardData."""
    from huggingface_hub import ModelCardData

    library, relation, _ = _WHAT[records.kind]
    tags = [*([records.objective] if records.run else []), "lora", "qlora_dpo"]
    license_: dict[str, Any] = dict(facts.license)
    data = ModelCardData(
        base_model=facts.base,
        base_model_relation=relation if facts.base else None,
        library_name=library,
        pipeline_tag="text-generation",
        datasets=list(facts.datasets) or None,
        tags=tags,
        model_name=facts.name,
        eval_results=_eval_results(records, facts) or None,
        **license_,
    )
    if data.eval_results is None:
        data.model_name = None
    return data


def hub_datasets(records: Records) -> list[str]:
    """The data sets that it was trained on and that are on the Hub."""
    sources = [source.get("source") for source in records.data.get("sources") or () if isinstance(source, dict)]
    named = sources or [records.config.get("dataset")]
    return list(dict.fromkeys(name for name in named if isinstance(name, str) and "/" in name and is_hub_id(name)))


def _eval_results(records: Records, facts: Facts) -> list[Any]:
    from huggingface_hub import EvalResult

    source = str(((records.summary.get("settings") or {}).get("prompts") or {}).get("source", "held-out pairs"))
    on_hub = "/" in source and is_hub_id(source)
    prompts = {"dataset_type": source if on_hub else _PAIRS, "dataset_name": without_paths(source)}
    held_out = {"dataset_type": _PAIRS, "dataset_name": "pairs held out of training"}
    found: list[dict[str, Any]] = []
    for method, verdict in verdicts_of(records):
        span = "95 % interval {:.3f} to {:.3f}".format(*verdict["interval"])
        name = f"win rate over the base by {method} ({span}, {verdict.get('prompts')} prompts)"
        found.append(prompts | {"metric_type": "win_rate", "metric_name": name, "metric_value": verdict["win_rate"]})
    for key, kind in (("eval_rewards/accuracies", "accuracy"), ("eval_rewards/margins", "reward_margin")):
        if records.metrics and key in records.metrics[-1]:
            name = f"reward {kind.split('_')[-1]}"
            value = records.metrics[-1][key]
            found.append(held_out | {"metric_type": kind, "metric_name": name, "metric_value": value})
    task = {"task_type": "text-generation", "task_name": "Text Generation"}
    return [EvalResult(**(task | one | {"metric_value": round(one["metric_value"], 4)})) for one in found]


def _opening(records: Records, facts: Facts) -> list[str]:
    base = f"`{facts.base}`" if facts.base else "a base that is on no hub"
    method = f", trained with {METHODS[records.objective]}" if records.run else ""
    what = _WHAT[records.kind][2].format(base=base)
    opening = [f"{what[0].upper()}{what[1:]}{method}. Written by qlora_dpo {__version__}."]
    if records.step is not None:
        total = records.status.get("total_steps", "?")
        opening.append(f"This is the checkpoint of step {records.step} of {total}.")
    if objections := records.objections():
        opening.append(
            "> **Its own measurements speak against this model:**\n"
            + "\n".join(f"> - {inline(one)}" for one in objections)
        )
    return opening
