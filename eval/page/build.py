"""Puts the tabs into one page, and says how it looks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from eval.page.blind import blind_tab
from eval.page.compare import compare_tab
from eval.page.parts import Page
from eval.page.run import Sections, data_tab, release_tab, training_tab
from eval.page.samples import samples_tab
from eval.page.text import showable
from eval.report.page import TEMPLATES

STYLE = Path(__file__).with_name("page.css")
FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans CJK SC",
    "sans-serif",
]
MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]

COLORS = {
    "body_background_fill": "page", "body_text_color": "ink", "body_text_color_subdued": "soft",
    "background_fill_primary": "card", "background_fill_secondary": "page", "block_background_fill": "card",
    "block_border_color": "rule", "border_color_primary": "rule", "block_label_text_color": "soft",
    "block_title_text_color": "soft", "input_background_fill": "page", "input_border_color": "rule",
    "input_background_fill_focus": "page", "input_placeholder_color": "faint",
    "button_secondary_background_fill": "card",
    "button_secondary_background_fill_hover": "grid", "button_secondary_border_color": "rule",
    "button_secondary_text_color": "ink",
}  # fmt: skip


def build_page(page: Page) -> gr.Blocks:
    """The Gradio page. Texts of models, data and visitors are shown as text, never as HTML."""
    words = page.words
    with gr.Blocks(title=f"{words('title')}: {showable(page.source.name)}", analytics_enabled=False) as blocks:
        gr.HTML(_head(page), apply_default_css=False, elem_classes="shown", elem_id="head")
        sections = Sections(page.source, page)
        with gr.Tabs():
            with gr.Tab(words("tab_compare"), id="compare"):
                compare_tab(page, blocks)
            with gr.Tab(words("tab_blind"), id="blind"):
                blind_tab(page, blocks)
            with gr.Tab(words("tab_samples"), id="samples"):
                samples_tab(page, blocks)
            with gr.Tab(words("tab_training"), id="training"):
                training_tab(page, sections, blocks)
            with gr.Tab(words("tab_data"), id="data"):
                data_tab(page, sections, blocks)
            with gr.Tab(words("tab_release"), id="release"):
                release_tab(page, sections, blocks)
    return blocks


def look() -> dict[str, Any]:
    """Theme and style, as Gradio takes them; fonts are those of the reader's machine."""
    theme = gr.themes.Base(
        primary_hue="blue", neutral_hue="gray", font=FONTS, font_mono=MONO, radius_size="lg", text_size="md"
    )
    colors = {f"{name}{kind}": f"var(--{color})" for name, color in COLORS.items() for kind in ("", "_dark")}
    theme.set(**colors)
    return {"theme": theme, "head": f"<style>{style()}</style>"}


def style() -> str:
    """The report's style within the parts that are made like it, and the page's own."""
    report = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    light, dark = (
        found[1].replace("color-scheme: light dark;", "")
        for found in re.finditer(r":root \{(.*?)\}", report, re.DOTALL)
    )
    rest = report.partition("* { box-sizing")[2]
    scoped = f".report {{ * {{ box-sizing{rest} }}"
    return f":root {{{light}}}\nbody.dark {{{dark}}}\n{scoped}\n{STYLE.read_text(encoding='utf-8')}"


def _head(page: Page) -> Markup:
    words = page.words
    lead = words("lead_model")
    if page.model is None:
        lead = words("lead_recorded", count=f"{len(page.source.recorded().rows):,}")
    return Markup('<header class="top"><h1>{} <span>{}</span></h1><p>{}</p></header>').format(
        words("title"), showable(page.source.name), lead
    )
