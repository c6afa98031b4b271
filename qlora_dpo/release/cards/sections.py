"""The sections of a card: each says what it finds in the records, or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qlora_dpo.config.training import ModelOptions, quantization_of
from qlora_dpo.release.cards.records import Records
from qlora_dpo.training.folder.run_folder import CURVES
from qlora_dpo.training.records.markdown import code_block, inline
from qlora_dpo.training.records.model_card import is_hub_id, result_lines, setting_lines, use_of_adapter

LONGEST_SAMPLE = 600  # characters
_OF_THIS_MACHINE = {"output_dir", "report_to", "run_name", "use_cpu", "gpu_price_per_hour"}
_LOCAL_PATH = re.compile(r"(?<![\w.:/])(?:~|\.{1,2}|[\w.-]+)?/(?:[\w.@+ -]+/)*[\w.@+-]+")
_FIDELITY = {
    "kl_mean": "KL per token", "kl_p99": "99th percentile", "kl_of_scale": "of KL(base, adapter)",
    "top1_agreement": "same likeliest token", "max_logp_difference": "largest log-prob difference",
    "margin_retained": "margin kept", "reward_accuracy": "reward accuracy",
    "update_kept": "update kept by storage",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What a card says besides the records."""

    name: str
    """Of the model, or its repository."""
    base: str | None
    """Hub id; None for a base that is not on the Hub."""
    license: Mapping[str, str]
    """Metadata: license, license_name, license_link; empty where nobody knows."""
    datasets: Sequence[str] = ()
    """Hub ids."""
    samples: int = 3
    """Answers that are shown."""
    has_curves: bool = False
    """Whether the picture of the curves goes along."""


def _results(records: Records, facts: Facts) -> list[str]:
    lines = result_lines(records.metrics) if records.metrics else []
    return [*lines, *(["", f"![training curves]({CURVES})"] if facts.has_curves else [])]


def _comparison(records: Records, facts: Facts) -> list[str]:
    verdicts, lines = verdicts_of(records), []
    if verdicts:
        lines += [
            f"{records.summary.get('prompts', '?')} prompts, the same for both, with the adapter switched off (before) "
            "and on (after), on the base as it was quantized in training.",
            "",
            "| judged by | win | tie | loss | win rate (95 % interval) | at equal length |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for method, one in verdicts:
            equal = _rate(one.get("length_controlled_win_rate"), one.get("length_controlled_interval"))
            lines.append(
                f"| {inline(method)} | {one.get('win')} | {one.get('tie')} | {one.get('loss')} | "
                f"{_rate(one['win_rate'], one['interval'])} | {equal} |"
            )
    rates = _part(records.summary, "rates")
    before, after = _part(rates, "before"), _part(rates, "after")
    if before and after:
        lines += ["", "| | before | after |", "|---|---:|---:|"]
        lines += [
            f"| {name.replace('_', ' ')} | {_short(before[name])} | {_short(after.get(name))} |" for name in before
        ]
    if of := _part(records.summary, "facts"):
        kept = f"{of.get('still_right')} of {of.get('right_before')}"
        lines += ["", f"Facts that the base states and the model still states: {kept}."]
    if of := _part(records.summary, "kl"):
        kl = f"{_short(of.get('mean'))} nats per answer, {_short(of.get('per_token'))} per token"
        lines += ["", f"KL to the base: {kl}."]
    return lines + _samples(records, facts)


def _samples(records: Records, facts: Facts) -> list[str]:
    rows = records.answers
    if not rows or facts.samples < 1:
        return []
    count = min(facts.samples, len(rows))
    shown = [rows[len(rows) * place // count] for place in range(count)]
    lines = ["", f"{count} of {len(rows)} answers, taken at equal distances:"]
    for row in shown:
        lines += [
            "",
            *code_block("\n\n".join(f"{name.upper()}: {_cut(row[name])}" for name in ("prompt", "before", "after"))),
        ]
    return lines


def _gate(records: Records, facts: Facts) -> list[str]:
    outcomes = [one for one in _list(records.gate, "outcomes") if isinstance(one, dict)]
    if not outcomes:
        return []
    lines = ["All rules hold." if records.gate.get("holds") else "**Not all rules hold.**", ""]
    lines += ["| holds | metric | value | rule |", "|---|---|---:|---|"]
    for one in outcomes:
        rule = f"{one.get('comparison', '').replace('_', ' ')} {_short(one.get('limit'))}"
        holds = "yes" if one.get("holds") else "**no**"
        lines.append(f"| {holds} | {inline(one.get('metric'))} | {_short(one.get('value'))} | {rule} |")
    return lines


def _merge(records: Records, facts: Facts) -> list[str]:
    candidates = [one for one in records.merge.get("candidates") or () if isinstance(one, dict)]
    if records.kind == "adapter":
        return []
    if not candidates:
        return ["Nobody measured how faithful this merge is to the trained adapter (no merge_report.json)."]
    columns = [name for name in _FIDELITY if any(name in one for one in candidates)]
    lines = [
        "Each candidate against the adapter on the base as it was trained, on held-out pairs:",
        "",
        "| merged into | " + " | ".join(_FIDELITY[name] for name in columns) + " | refused because |",
        "|---|" + "---:|" * len(columns) + "---|",
    ]
    for one in candidates:
        is_chosen = one.get("name") == records.merge.get("chosen")
        name = f"**{inline(one.get('name'))}** (this one)" if is_chosen else inline(one.get("name"))
        cells = [_short(one.get(column)) for column in columns]
        problems = inline("; ".join(map(str, one.get("problems") or ())))
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {problems} |")
    of = _part(records.merge, "yardstick")
    scale, noise = _short(of.get("scale_kl_mean")), _short(of.get("noise_kl_mean"))
    read = f"For comparison: the base alone has a KL per token of {scale}, the adapter itself, computed twice, {noise}."
    remarks = [*_list(of, "notes"), *_list(records.chosen_merge, "warnings")]
    return [
        *lines,
        *(["", read] if of else []),
        *[line for one in remarks for line in ("", inline(one))],
        *_check(records),
    ]


def _check(records: Records) -> list[str]:
    if not records.check.get("passed"):
        return []
    count = records.check.get("prompts", "some")
    return ["", f"`release check` replayed {inline(count)} prompts: it does what the trained adapter does."]


def _data(records: Records, facts: Facts) -> list[str]:
    lines = [f"- {inline(without_paths(str(line)))}" for line in _list(records.data, "summary")]
    if not lines and records.config.get("dataset"):
        lines = [f"- {inline(without_paths(str(records.config['dataset'])))}"]
    rules = _part(_part(records.data, "lint"), "rules").items()
    found = [f"{name} ({rule.get('count')})" for name, rule in rules if isinstance(rule, dict)]
    return [*lines, *([f"- `data lint` found: {inline(', '.join(found))}"] if found else [])]


def _settings(records: Records, facts: Facts) -> list[str]:
    if not records.config:
        return []
    kept = {name: value for name, value in records.config.items() if name not in _OF_THIS_MACHINE}
    everything = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    shown = {
        name: inline(", ".join(map(str, value)) if isinstance(value, list) else value)
        for name, value in records.config.items()
    }
    return [
        *setting_lines(shown, records.objective),
        "",
        "<details><summary>All options</summary>",
        "",
        *code_block("\n".join(map(without_paths, everything.rstrip().splitlines())), "yaml"),
        "",
        "</details>",
    ]


def _use(records: Records, facts: Facts) -> list[str]:
    return USES[records.kind](records, facts)


def _use_adapter(records: Records, facts: Facts) -> list[str]:
    base = facts.base or "PATH_OF_THE_BASE"
    held = ModelOptions(
        **{name: records.config[name] for name in ModelOptions.__dataclass_fields__ if name in records.config}
    )
    quantization, is_known = quantization_of(held), bool(records.config)
    dtype: str | None = held.dtype
    if not records.config and records.held.get("is_known"):
        quantization, dtype, is_known = records.held.get("quantization"), records.held.get("dtype"), True
    lines = use_of_adapter(facts.name, base, records.own.get("revision"), quantization, dtype)
    if not is_known:
        lines[0] = "How the base was held in training is not recorded; this is the usual QLoRA setting."
    quantized = " --quantization bitsandbytes" if quantization else ""
    rank = int(records.own.get("r") or 16)
    return [
        *lines,
        "",
        "With vLLM:",
        "",
        *code_block(
            f"vllm serve {base}{quantized} --enable-lora --max-lora-rank {max(16, rank)} "
            f"--lora-modules {facts.name.rpartition('/')[2]}={facts.name}",
            "bash",
        ),
    ]


def _use_merged(records: Records, facts: Facts) -> list[str]:
    dtype = records.own.get("dtype") or records.own.get("torch_dtype") or "auto"
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{facts.name}", dtype="{dtype}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")'
    )
    return [*code_block(code, "python"), "", "With vLLM:", "", *code_block(f"vllm serve {facts.name}", "bash")]


def _use_gguf(records: Records, facts: Facts) -> list[str]:
    has_modelfile = (records.folder / "Modelfile").is_file()
    name = facts.name.rpartition("/")[2].lower()
    commands = [f"llama-server -hf {facts.name}"] if "/" in facts.name else []
    commands += [f"ollama create {name} -f Modelfile", f"ollama run {name}"] if has_modelfile else []
    files = [f"- `{path.name}`" for path in sorted(records.folder.glob("*.gguf"))]
    return [*files, *(["", *code_block("\n".join(commands), "bash")] if commands else [])]


SECTIONS: dict[str, Callable[[Records, Facts], list[str]]] = {
    "Result": _results,
    "Before and after": _comparison,
    "Gate": _gate,
    "Merge": _merge,
    "Data": _data,
    "Settings": _settings,
    "Use": _use,
}
USES: dict[str, Callable[[Records, Facts], list[str]]] = {
    "adapter": _use_adapter, "merged": _use_merged, "gguf": _use_gguf
}  # fmt: skip


def verdicts_of(records: Records) -> list[tuple[str, dict[str, Any]]]:
    """(method, numbers) of a comparison's verdicts, without those that lack a rate or its interval."""
    verdicts = _part(records.summary, "verdicts").items()
    return [
        (method, one)
        for method, one in verdicts
        if isinstance(one, dict)
        and isinstance(one.get("win_rate"), int | float)
        and len(one.get("interval") or ()) == 2
    ]


def without_paths(text: str) -> str:
    """`text` with the last part of each path of this machine instead of all of it."""
    return _LOCAL_PATH.sub(lambda path: path[0] if is_hub_id(path[0]) else path[0].rpartition("/")[2], text)


def _part(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def _list(content: Mapping[str, Any], name: str) -> list[Any]:
    found = content.get(name)
    return found if isinstance(found, list) else []


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " […]"


def _rate(rate: Any, interval: Any) -> str:
    if not isinstance(rate, int | float):
        return "–"
    span = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
    return f"{100 * rate:.1f} %{span}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–" if value is None else inline(value)
