"""All that a released folder and its run tell about it, for the card and for the question whether it may go."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.training.folder.content import weights_fingerprint
from qlora_dpo.training.folder.run_folder import CONFIG, METRICS, SAMPLES, STATUS
from qlora_dpo.training.records.tracking import read_metrics
from qlora_dpo.training.trained_on import BASE_HELD

Kind = Literal["adapter", "merged", "gguf"]
ADAPTER_CONFIG, MODEL_CONFIG, MERGE_REPORT, GGUF_REPORT, CHECK_REPORT = (
    "adapter_config.json", "config.json", "merge_report.json", "gguf_report.json", "release_check.json"
)  # fmt: skip
DATA, DEMO, COMPARISON, SUMMARY, ANSWERS, GATE = (
    "data.json", "before_after.json", "compare", "summary.json", "answers.jsonl", "gate.json"
)  # fmt: skip
WEIGHTS: dict[Kind, str] = {"adapter": "adapter_model.safetensors", "merged": "model*.safetensors", "gguf": "*.gguf"}
_UNFINISHED = (
    "{run} is a run that has not finished (step {step} of {of}). Run the same train command again to finish it, or "
    "name one of its checkpoint folders."
)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Records:
    """What was found; empty where there is nothing."""

    folder: Path
    kind: Kind
    run: Path | None = None
    step: int | None = None
    """Of a checkpoint; None for the end of a run."""
    status: dict[str, Any] = field(default_factory=dict)
    """run.json."""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl, of a checkpoint up to its step."""
    data: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(default_factory=list)
    """prompt, before, after."""
    gate: dict[str, Any] = field(default_factory=dict)
    merge: dict[str, Any] = field(default_factory=dict)
    check: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    """adapter_config.json or config.json."""
    held: dict[str, Any] = field(default_factory=dict)
    """base_quantization.json."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and what does not belong to this model."""

    @property
    def objective(self) -> str:
        """dpo or sft."""
        return str(self.config.get("objective", "dpo"))

    @property
    def base(self) -> str | None:
        """What the model was trained from: a Hub id, or a path on this machine."""
        base = self.own.get("base_model_name_or_path") if self.kind == "adapter" else None
        return base or self.config.get("model_name_or_path") or self.merge.get("base_model")

    @property
    def chosen_merge(self) -> dict[str, Any]:
        """The candidate that the merged folder holds."""
        candidates = [one for one in self.merge.get("candidates") or () if isinstance(one, dict)]
        return next((one for one in candidates if one.get("name") == self.merge.get("chosen")), {})

    def objections(self) -> list[str]:
        """What the tool's own measurements say against this model."""
        problems = [str(problem) for problem in self.chosen_merge.get("problems") or ()]
        found = [f"the merge was refused and forced: {problem}" for problem in problems]
        if self.check and not self.check.get("passed", True):
            found += [
                f"release check failed: {problem}" for problem in self.check.get("problems") or ["no reason given"]
            ]
        if self.gate and not self.gate.get("holds", True):
            failed = [str(one.get("metric")) for one in self.gate.get("outcomes", ()) if not one.get("holds")]
            found.append(f"the gate does not hold: {', '.join(failed)}")
        if self.run not in (None, self.folder) and self.step is None and not self.is_finished:
            found.append("the run that it comes from has not finished")
        return found

    @property
    def is_finished(self) -> bool:
        """Whether the run did all its steps."""
        return self.status.get("status") == "finished"


def kind_of(folder: Path) -> Kind:
    """What a folder holds.

    Raises:
        StorageError: it is not there or empty.
        UsageError: it holds nothing that can be released.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise StorageError(f"{folder} is {what}. Name the folder of a run, an adapter, a merged model or GGUF files.")
    if not any(folder.iterdir()):
        raise StorageError(f"{folder} is empty. Name the folder of a run, an adapter, a merged model or GGUF files.")
    if (folder / ADAPTER_CONFIG).is_file() and (folder / WEIGHTS["adapter"]).is_file():
        return "adapter"
    if (folder / MODEL_CONFIG).is_file() and any(folder.glob(WEIGHTS["merged"])):
        return "merged"
    if any(folder.glob(WEIGHTS["gguf"])):
        return "gguf"
    if (folder / CONFIG).is_file():
        raise UsageError(
            f"{folder} is a run without an adapter yet. Run the same train command again to finish it, or name one of "
            "its checkpoint folders."
        )
    raise UsageError(
        f"{folder} holds no adapter (adapter_config.json and adapter_model.safetensors), no merged model (config.json "
        "and model*.safetensors) and no *.gguf. Name such a folder."
    )


def read_records(folder: Path, run: Path | None = None) -> Records:
    """Read a folder and the run that it comes from: `run`, else the one that the folder is in or names.

    Raises:
        StorageError, UsageError: see `kind_of`; `run` is no run, or the folder is a run that has not finished.
    """
    kind, notes = kind_of(folder), list[str]()
    own = _object(folder / (ADAPTER_CONFIG if kind == "adapter" else MODEL_CONFIG), notes)
    # A run's folder has the report of what was merged from it, which says nothing about its adapter.
    merge = {} if kind == "adapter" else _object(folder / MERGE_REPORT, notes) or _merge_of_gguf(folder, notes)
    held = _object(folder / BASE_HELD, notes) if kind == "adapter" else {}
    run, step = _run_of(folder, run, merge or held)
    found: dict[str, Any] = {"check": _check(folder, notes), "merge": merge, "own": own, "held": held}
    if run is not None:
        found["status"] = status = _object(run / STATUS, notes)
        if folder == run and status.get("status") != "finished":
            raise UsageError(_UNFINISHED.format(run=run, step=status.get("step", 0), of=status.get("total_steps", "?")))
        metrics = [row for row in read_metrics(run / METRICS) if step is None or row.get("step", 0) <= step]
        found |= {
            "config": _settings(run / CONFIG, notes),
            "metrics": metrics,
            "data": _object(run / DATA, notes),
            **_comparison(run, step, notes),
        }
        found["answers"] = found["answers"] or _demo_answers(run, notes) or _sample_answers(run, step, notes)
    return Records(folder, kind, run, step, **found, notes=notes)


def _run_of(folder: Path, named: Path | None, report: dict[str, Any]) -> tuple[Path | None, int | None]:
    """(the run, the step of a checkpoint in it)."""
    if named is not None and not (named / CONFIG).is_file():
        raise UsageError(f"--run {named} is no run of this tool: it has no {CONFIG}. Name its folder (--output_dir).")
    paths = [report.get(key) for key in ("adapter", "run")]
    sources = [folder, *(Path(path).expanduser() for path in paths if isinstance(path, str))]
    for source in [named] if named else sources:
        if (source / CONFIG).is_file():
            return source, None
        checkpoint = _CHECKPOINT.fullmatch(source.absolute().name)
        if checkpoint and (source.absolute().parent / CONFIG).is_file():
            return source.absolute().parent, int(checkpoint[1])
    return None, None


def _merge_of_gguf(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The report of the merged folder that GGUF files were made from, as far as it is still there."""
    report = _object(folder / GGUF_REPORT, notes)
    merged = report.get("folder")
    return report | (_object(Path(merged).expanduser() / MERGE_REPORT, notes) if isinstance(merged, str) else {})


def _check(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The verdict of `release check`, where it is about these weights."""
    check = _object(folder / CHECK_REPORT, notes)
    noted = check.get("weights")  # a folder of GGUF files has no such weights, and no such check
    if noted is not None and noted != weights_fingerprint(folder):
        notes.append(f"{folder / CHECK_REPORT} is about other weights than these, so nobody heeds it: check again.")
        return {}
    return check


def _comparison(run: Path, step: int | None, notes: list[str]) -> dict[str, Any]:
    """Summary, answers and gate of a comparison, where it is one of the run's adapter as it is now."""
    nothing: dict[str, Any] = {"summary": {}, "answers": [], "gate": {}}
    adapter = run if step is None else run / f"checkpoint-{step}"
    folder = run / (COMPARISON if step is None else f"{COMPARISON}-checkpoint-{step}")
    summary = _object(folder / SUMMARY, notes)
    if not summary:
        return nothing
    compared = (summary.get("settings") or {}).get("adapter_fingerprint")
    is_there = (adapter / WEIGHTS["adapter"]).is_file()
    if compared and is_there and compared != weights_fingerprint(adapter):
        notes.append(f"{folder} compared other weights than these, so the card leaves it out.")
        return nothing
    gate = _object(folder / GATE, notes)
    digest = hashlib.sha256((folder / SUMMARY).read_bytes()).hexdigest()
    if gate and gate.get("summary") != digest:
        notes.append(f"{folder / GATE} judged an earlier summary, so the card leaves it out: run the gate again.")
        gate = {}
    answers = [
        {"prompt": _text(row["prompt"]), "before": str(row["before"]["text"]), "after": str(row["after"]["text"])}
        for row in _rows(folder / ANSWERS, notes)
        if isinstance(row.get("before"), dict) and isinstance(row.get("after"), dict) and "prompt" in row
    ]
    return {"summary": summary, "answers": answers, "gate": gate}


def _demo_answers(run: Path, notes: list[str]) -> list[dict[str, str]]:
    rows = _object(run / DEMO, notes).get("answers") or ()
    return [_answer(row) for row in rows if isinstance(row, dict)]


def _sample_answers(run: Path, step: int | None, notes: list[str]) -> list[dict[str, str]]:
    rows = [row for row in _rows(run / SAMPLES, notes) if step is None or row.get("step", 0) <= step]
    last = max((row.get("step", 0) for row in rows), default=0)
    return [_answer(row) for row in rows if row.get("step", 0) == last]


def _answer(row: dict[str, Any]) -> dict[str, str]:
    return {name: _text(row.get(name, "")) for name in ("prompt", "before", "after")}


def _text(prompt: Any) -> str:
    """A prompt, or messages, as text."""
    if isinstance(prompt, list):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt if isinstance(turn, dict))
    return str(prompt)


def _settings(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        notes.append(f"{file} cannot be read ({type(error).__name__}), so the card lacks the settings.")
        return {}


def _object(file: Path, notes: list[str]) -> dict[str, Any]:
    """The object of a JSON file; empty where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{file} cannot be read ({type(error).__name__}), so the card lacks what it says.")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{file} holds no JSON object, so the card lacks what it says.")
        return {}
    return content


def _rows(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; broken lines are counted."""
    if not file.is_file():
        return
    broken = 0
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                broken += bool(line.strip())
                continue
            if isinstance(row, dict):
                yield row
    if broken:
        notes.append(f"{file}: {broken} lines cannot be read and are left out of the card.")
