"""Puts a run into the page: one HTML file that loads nothing, whose texts are all escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.report.curves import categories, charts, skipped_steps
from eval.report.reasons import reasons, setting, shift_of
from eval.report.results import data_of, other_facts, percent, rate_rows, tables_of, verdict_rows
from eval.report.run import Run, number
from eval.report.samples import sample_groups
from eval.report.svg import Chart, draw, is_logarithmic, short, sparkline
from eval.report.words import Language, words_in
from eval.texts import showable
from qlora_dpo import __version__

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_SETTINGS = (
    "learning_rate", "beta", "loss_type", "loss_weights", "label_smoothing", "on_displacement", "num_train_epochs",
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_ratio", "max_grad_norm",
    "lora_r", "lora_alpha", "max_length", "max_prompt_length", "dataset", "eval_dataset", "chosen_key", "rejected_key",
    "reference_model", "dtype", "seed",
)  # fmt: skip
LONGEST = 2000  # characters of any text, such as a name; answers are cut earlier, with a word about it
# What a browser may not show, or shows as something else: controls but tab and line feed, marks that turn the direction

Words = Callable[..., str]


def page_of(run: Run, *, language: Language = "en", price_per_hour: float | None = None) -> str:
    """The whole page."""
    words = words_in(language)
    drawn = charts(run, words)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, finalize=_showable,
    )  # fmt: skip
    style, script = (Markup((TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        language={"en": "en", "zh": "zh-Hans"}[language],
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; "
        "form-action 'none'",
        words=words,
        run=run,
        state=_state(run, words),
        facts=_facts(run, words),
        tiles=_tiles(run, words, price_per_hour),
        skipped=_skipped(run, words),
        changed=_changed(run, words),
        why=_why(run, words),
        charts=[_framed(name, chart, words) for name, chart in drawn.items()],
        curves_note=_curves_note(run, drawn.values(), words),
        categories=_categories(run),
        data=data_of(run, words),
        groups=sample_groups(run, words),
        comparison=_comparison(run, words),
        merge=tables_of(run.merge) if run.merge else None,
        settings=_settings(run),
        versions=[(name, setting(found)) for name, found in _environment(run).items()],
        made=words("made", time=f"{datetime.now():%F %H:%M}", version=__version__),
    )


def _showable(found: Any) -> Any:
    """A text without what a browser may not show, without keys, not longer than all; the page's own markup as it is."""
    if not isinstance(found, str) or isinstance(found, Markup):
        return found
    return showable(found, LONGEST)


def _hash(text: str) -> str:
    """As a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _state(run: Run, words: Words) -> dict[str, str]:
    time = words("since" if run.state == "going" else "last_written", time=run.since)
    return {"name": run.state, "word": words(run.state), "time": time if run.since else ""}


def _environment(run: Run) -> Mapping[str, Any]:
    found = run.status.get("environment")
    return found if isinstance(found, dict) else {}


def _facts(run: Run, words: Words) -> list[tuple[str, str]]:
    """What was trained, on what, where."""
    environment = _environment(run)
    machine = [*(environment.get("gpus") or [])] or [str(environment.get("processor", ""))]
    if environment.get("cores"):
        machine.append(words("cores", count=environment["cores"]))
    if environment.get("memory_gib"):
        machine.append(f"{setting(environment['memory_gib'])} GiB")
    reference = run.config.get("reference_model") or words("base_off")
    facts = [
        (words("objective"), words("objective_sft" if run.objective == "sft" else "objective_dpo")),
        (words("model"), setting(run.config.get("model_name_or_path"))),
        (words("data"), setting(run.config.get("dataset"))),
        (words("hardware"), ", ".join(map(str, filter(None, machine)))),
    ]
    if run.objective == "dpo":
        facts.insert(2, (words("reference"), str(reference)))
    return [(name, value) for name, value in facts if value]


def _tiles(run: Run, words: Words, price_per_hour: float | None) -> list[tuple[str, str, str]]:
    """(name, number, note) of what one looks for first."""
    total = "" if run.total_steps is None else words("of_steps", total=f"{run.total_steps:,}")
    tiles = [(words("steps"), f"{run.steps:,}", total), *_results(run, words), *_win_rates(run, words)]
    if run.metrics:
        left = (
            ""
            if run.hours_left is None or run.state != "going"
            else words("time_left", time=_time(run.hours_left, words))
        )
        tiles.append((words("time"), _time(run.hours, words), left or words("only_steps")))
    if price_per_hour is not None and run.metrics:
        cost = f"{run.hours * price_per_hour:,.2f}"
        tiles.append((words("cost"), cost, words("cost_at", price=f"{price_per_hour:g}")))
    return tiles


def _results(run: Run, words: Words) -> list[tuple[str, str, str]]:
    """The newest of what says how well it went, held-out before training."""
    wanted: list[tuple[str, str, Callable[[float], str]]] = [
        ("accuracy", "rewards/accuracies", percent), ("margin", "rewards/margins", short), ("loss", "loss", short),
        ("token_accuracy", "mean_token_accuracy", percent),
    ]  # fmt: skip
    tiles = []
    for name, key, form in wanted:
        for prefix, side in (("eval_", "held_out"), ("", "training")):
            row = next((row for row in reversed(run.metrics) if isinstance(row.get(prefix + key), int | float)), None)
            if row is not None:
                step = words("last_step", step=f"{row['step']:,}")
                tiles.append((words(f"{side}_{name}"), form(row[prefix + key]), step))
                break
    return tiles


def _win_rates(run: Run, words: Words) -> list[tuple[str, str, str]]:
    rows = [] if run.comparison is None else verdict_rows(run.comparison.summary)
    return [(words("win_rate_of", method=row["name"]), row["rate"], row["interval"]) for row in rows[:2]]


def _time(hours: float, words: Words) -> str:
    if hours >= 1:
        return words("hours", value=f"{hours:,.1f}")
    return (
        words("minutes", value=f"{60 * hours:.0f}")
        if hours >= 1 / 30
        else words("seconds", value=f"{3600 * hours:.0f}")
    )


def _skipped(run: Run, words: Words) -> str:
    steps = skipped_steps(run.metrics)
    listed = ", ".join(map(str, steps[:10]))
    if len(steps) > 10:
        listed = words("and_more", steps=listed, count=len(steps) - 10)
    return words("skipped", count=len(steps), steps=listed) if steps else ""


def _changed(run: Run, words: Words) -> list[str]:
    entries = run.status.get("changed")
    keys = ("step", "name", "was", "now")
    return [
        words("changed", **{key: setting(entry.get(key)) for key in keys})
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]


def _why(run: Run, words: Words) -> dict[str, Any] | None:
    shift = shift_of(run.metrics, number(run.config.get("beta"))) if run.objective == "dpo" else None
    return None if shift is None else reasons(shift, run.config, words)


def _framed(name: str, chart: Chart, words: Words) -> dict[str, Any]:
    """A chart with its heading and legend, which shows the last values."""
    legend = [
        {
            "label": line.label,
            "color": line.color,
            "is_dots": line.is_held_out,
            "last": short(line.series.finite[-1].mean or 0),
        }
        for line in chart.lines
    ]
    return {
        "name": name,
        "title": chart.title,
        "help": words(f"{name}_help"),
        "legend": legend,
        "is_log": is_logarithmic(chart),
        "svg": draw(chart),
    }


def _curves_note(run: Run, drawn: Iterable[Chart], words: Words) -> str:
    grouped = [line.series for chart in drawn for line in chart.lines if line.series.is_grouped]
    if not grouped:
        return words("curves_plain")
    size = round(len(run.metrics) / len(grouped[0].points))
    return words("curves_grouped", steps=f"{len(run.metrics):,}", size=size)


def _categories(run: Run) -> dict[str, Any]:
    prefix, rows = categories(run)
    shown = [
        {
            "name": row["name"],
            "count": "–" if row["count"] is None else f"{row['count']:,.0f}",
            "loss": _or_dash(row["loss"], short),
            "accuracy": _or_dash(row["accuracy"], percent),
            "margin": _or_dash(row["rewards/margins"], short),
            "spark": sparkline(row["loss_series"]) if row["loss_series"] else "",
        }
        for row in rows
    ]
    return {"rows": shown, "is_held_out": prefix == "eval_"}


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "–" if value is None else form(value)


def _comparison(run: Run, words: Words) -> dict[str, Any] | None:
    if run.comparison is None or not run.comparison.summary:
        return None
    summary = run.comparison.summary
    return {
        "verdicts": verdict_rows(summary),
        "rates": rate_rows(summary, words),
        "facts": other_facts(summary, words),
    }


def _settings(run: Run) -> dict[str, list[tuple[str, str]]]:
    shown = [(name, setting(run.config[name])) for name in SHOWN_SETTINGS if name in run.config]
    rest = [(str(name), setting(value)) for name, value in run.config.items() if name not in SHOWN_SETTINGS]
    return {"shown": shown, "rest": rest}
