"""The tabs about the run: Training, live while it goes on, Data and Release. They show sections of the report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import gradio as gr
from markupsafe import Markup

from eval.answers import SUMMARY, VERDICTS
from eval.page.parts import Page, light
from eval.page.source import Cached, Source, quoted, stamp
from eval.page.text import notice, table
from eval.page.words import Words
from eval.report.page import TEMPLATES, page_of
from eval.report.run import MERGE, Run, read_run
from eval.report.svg import short
from qlora_dpo.errors import QloraDpoError
from qlora_dpo.training.folder.run_folder import CONFIG, METRICS, STATUS
from qlora_dpo.training.folder.run_lock import LOCK

EVERY = 5  # seconds
WATCHED = (METRICS, STATUS, CONFIG, MERGE, LOCK, f"compare/{SUMMARY}", f"compare/{VERDICTS}")
COLUMNS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "grad_norm",
    "learning_rate", "tokens_per_second",
)  # fmt: skip
LATEST = 12
CURVES, DETAILS = ("tiles", "why", "curves"), ("categories", "settings")
DATA, RELEASE = ("data",), ("verdicts", "merge")
# Only sections that the report made are in it: texts are escaped there, so none can hold such an end.
_SECTION = re.compile(r'<section[^>]* id="(\w+)">.*?</section>', re.DOTALL)
_HEADER = re.compile(r'<div class="tiles">.*?</div>\s*<nav>', re.DOTALL)
# The report's script fills legends while one points at a chart. Here charts come later: with their tab, and anew while
# the run goes on.
READ_CHARTS = """() => {
  const read = () => {
    if (!document.querySelector("figure.chart:not(.read)")) return;
    %s
  };
  new MutationObserver(read).observe(document.body, {childList: true, subtree: true});
  read();
}"""


class Sections:
    """The report of a run in parts, made again when the run has written something."""

    def __init__(self, source: Source, page: Page) -> None:
        self._source, self._page = source, page
        self._cached = Cached(self._make)

    def __call__(self) -> tuple[Run, dict[str, Markup]]:
        """The run and its sections.

        Raises:
            StorageError: the run is gone.
        """
        found: tuple[Run, dict[str, Markup]] = self._cached(stamp(self._source.run, WATCHED))
        return found

    def _make(self) -> tuple[Run, dict[str, Markup]]:
        assert self._source.run is not None
        run = read_run(self._source.run)
        whole = page_of(run, language=self._page.language)
        parts = {found[1]: Markup(found[0]) for found in _SECTION.finditer(whole)}
        if tiles := _HEADER.search(whole):
            parts["tiles"] = Markup(tiles[0].removesuffix("<nav>"))
        return run, parts

    @property
    def has_run(self) -> bool:
        """Whether there is one to report on."""
        return self._source.run is not None

    def show(self, names: Sequence[str]) -> Markup:
        """These sections, or a sentence why there are none."""
        if not self.has_run:
            return _report(notice(self._page.words("no_run")))
        try:
            _, parts = self()
        except (QloraDpoError, OSError) as error:
            return _report(notice(str(error)))
        return _report(Markup("").join(parts[name] for name in names if name in parts))


def training_tab(page: Page, sections: Sections, blocks: gr.Blocks) -> None:
    """Build the tab: the curves, and the latest steps as a table."""
    words = page.words
    shown = gr.HTML(apply_default_css=False, elem_classes="shown", elem_id="training")
    seen = gr.State(None)
    timer = gr.Timer(EVERY, active=page.source.run is not None)

    def read(old: Any) -> list[Any]:
        now = repr(stamp(page.source.run, WATCHED))
        if now == old:
            return [gr.skip(), gr.skip()]
        return [now, _training(sections, words)]

    gr.on([blocks.load, timer.tick], read, [seen], [seen, shown], **light(api_name="training"))
    blocks.load(None, None, None, js=READ_CHARTS % _script())


def data_tab(page: Page, sections: Sections, blocks: gr.Blocks) -> None:
    """Build the tab: what became of the rows, and what lint found."""
    shown = gr.HTML(apply_default_css=False, elem_classes="shown", elem_id="data")
    blocks.load(lambda: sections.show(DATA), None, [shown], **light(api_name=False))


def release_tab(page: Page, sections: Sections, blocks: gr.Blocks) -> None:
    """Build the tab: verdicts, what merging changed, and the commands to go on with."""
    words, source = page.words, page.source
    shown = gr.HTML(apply_default_css=False, elem_classes="shown", elem_id="release")

    def show() -> Markup:
        found = sections.show(RELEASE)
        return found if 'id="merge"' in found else found + _report(notice(words("no_merge")))

    blocks.load(show, None, [shown], **light(api_name=False))
    adapter = quoted(source.adapter or source.run, "RUN")
    commands = {
        "command_compare": f"python -m eval compare --adapter {adapter}",
        "command_gate": f"python -m eval gate {quoted(source.comparison, adapter)}",
        "command_merge": f"python -m qlora_dpo merge --adapter {adapter} --output {_merged(adapter)}",
        "command_report": f"python -m eval report {quoted(source.run, adapter)}",
        "command_votes": f"python -m qlora_dpo data inspect {quoted(page.ballots.pairs, 'votes.jsonl')}",
    }
    for name, command in commands.items():
        gr.Textbox(
            command, label=words(name), interactive=False, buttons=["copy"], elem_classes="command", lines=1,
            elem_id=name.replace("_", "-"),
        )  # fmt: skip


def _script() -> str:
    """The report's script, for charts that it has not seen."""
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8").removeprefix('"use strict";')
    script = script.replace('querySelectorAll("figure.chart")', 'querySelectorAll("figure.chart:not(.read)")')
    return script.replace("const svg =", 'chart.classList.add("read");\n  const svg =', 1)


def _merged(adapter: str) -> str:
    return f"{adapter[:-1]}-merged'" if adapter.endswith("'") else f"{adapter}-merged"


def _training(sections: Sections, words: Words) -> Markup:
    """Curves, the latest steps, and what they were made with."""
    shown = sections.show(CURVES)
    try:
        metrics = sections()[0].metrics if sections.has_run else []
    except (QloraDpoError, OSError):
        return shown
    rows = [row for row in metrics if "loss" in row][-LATEST:]
    if not rows:
        return shown
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [[f"{row['step']:,}", *(_number(row.get(name)) for name in columns)] for row in reversed(rows)]
    live = notice(words("live", seconds=EVERY)) if sections()[0].state == "going" else Markup("")
    steps = Markup("<h2>{}</h2>{}{}").format(words("latest_steps"), live, table([words("step"), *columns], lines))
    return shown + _report(steps) + sections.show(DETAILS)


def _number(value: Any) -> str:
    return short(float(value)) if isinstance(value, int | float) else "–"


def _report(body: Markup) -> Markup:
    return Markup('<div class="report">{}</div>').format(body)
