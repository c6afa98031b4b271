"""The page as it is put together: what it refuses, what it says in both languages, and that texts stay texts."""

from __future__ import annotations

import html
import re
import string
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from comparisons import row
from pages import make_comparison, make_page
from payloads import PAYLOADS
from report_runs import long_run, make_run

from eval.app import serve
from eval.options import AppOptions
from eval.page.answers import Answer, Part
from eval.page.blind import _view
from eval.page.build import style
from eval.page.parts import answer_card
from eval.page.run import CURVES, DATA, RELEASE, Sections, _training
from eval.page.samples import Filter, _page
from eval.page.source import Source, recorded_source
from eval.page.words import LABELS, language_of, words_in
from qlora_dpo.errors import StorageError, UsageError

ROOT = Path(__file__).resolve().parents[2]
WORDS = words_in("en")
# Elements and attributes that the page itself uses; a payload that came to life would add another.
ELEMENTS = {
    "div", "h4", "span", "ul", "li", "b", "p", "details", "summary", "article", "header", "h1", "svg", "line", "circle",
}  # fmt: skip
ATTRIBUTES = {"class", "dir", "title", "style", "open"}


class Seen(HTMLParser):
    """What a browser would make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(markup: str) -> Seen:
    found = Seen()
    found.feed(str(markup))
    return found


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_text_stays_a_text_wherever_it_is_shown(payload: str, tmp_path: Path) -> None:
    bad = row(1, payload, f"{payload} after", prompt=payload, category=payload, reference_answer=payload)
    page = make_page(Source(run=None, comparison=make_comparison(tmp_path / "c", [bad])))
    recorded = page.source.recorded()
    ballot = page.ballots.draw(payload, payload, payload)
    written = Answer(payload, 1, "stop", 1.0, -1.0, 0.1, (Part(payload, -1.0, -2.0),))
    shown = [
        _page(Filter()(recorded), 0, recorded, WORDS), _view(page, ballot, True), _view(page, ballot, False),
        answer_card("after", written, WORDS),
    ]  # fmt: skip
    for markup in shown:
        found = seen(markup)
        assert found.elements <= ELEMENTS
        assert found.attributes <= ATTRIBUTES
        visible = re.sub("[\x00-\x08\u202e\ud83d]", "\N{REPLACEMENT CHARACTER}", payload)
        assert visible in found.text
        markup.encode()  # no half characters, which no answer of a server can hold


def test_an_open_round_does_not_tell_the_sides(tmp_path: Path) -> None:
    page = make_page(Source(run=None, comparison=make_comparison(tmp_path / "c")))
    for _ in range(8):
        ballot = page.ballots.draw("w1", "one", "two")
        markup = _view(page, ballot, True)
        hidden = markup.replace(ballot.left, "X").replace(ballot.right, "X")
        assert hidden == _view(page, page.ballots.draw("w1", "X", "X"), True)
        assert "adapter" not in markup and "adapter on" in _view(page, ballot, False)


def test_every_label_has_the_same_places_in_both_languages() -> None:
    def places(text: str) -> set[str | None]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    for name, (english, chinese) in LABELS.items():
        assert english and chinese, name
        assert places(english) == places(chinese), name


def test_every_label_is_used() -> None:
    code = "".join(path.read_text() for path in (ROOT / "eval" / "page").glob("*.py") if path.name != "words.py")
    made = (
        "vote_",
        "winner_",
        "order_",
        "export_",
        "command_",
        "tab_",
        "is_",
        "pick",
        "adapter_o",
        "before",
        "after",
        "logp",
    )
    unused = [name for name in LABELS if f'"{name}"' not in code and not name.startswith(made)]
    assert unused == []


@pytest.mark.parametrize(
    ("variables", "language"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": "C"}, "en"),
        ({"LC_MESSAGES": "zh_TW"}, "zh"),
        ({}, "en"),
    ],
)
def test_auto_is_the_language_of_the_terminal(
    variables: dict[str, str], language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language_of("auto") == language
    assert (language_of("en"), language_of("zh")) == ("en", "zh")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (AppOptions(), "either --adapter"),
        (AppOptions(adapter=Path("a"), recorded=Path("b")), "either --adapter"),
        (AppOptions(recorded=Path("a"), port=65536), "--port 65536"),
        (AppOptions(adapter=Path("a"), max_new_tokens=0), "--max_new_tokens 0"),
        (AppOptions(recorded=Path("a"), use_cpu=True), "--recorded"),
        (AppOptions(recorded=Path("a"), host="0.0.0.0"), "--auth"),
    ],
)
def test_options_that_cannot_work_are_refused(options: AppOptions, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        serve(options)


def test_what_recorded_may_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", long_run(3))
    folder = make_comparison(run / "compare")
    for name in (folder, folder / "answers.jsonl", run):
        source = recorded_source(name)
        assert source.run == run and len(source.recorded().rows) == 3
        assert source.votes_folder == folder
    alone = recorded_source(make_comparison(tmp_path / "alone"))
    assert alone.run is None and alone.name == "alone"
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "missing", run / "config.yaml"):
        with pytest.raises(StorageError, match="--recorded"):
            recorded_source(name)


def test_recorded_answers_are_read_again_when_there_are_more(tmp_path: Path) -> None:
    source = recorded_source(make_comparison(tmp_path / "c", [row(0)]))
    assert len(source.recorded().rows) == 1
    make_comparison(tmp_path / "c", [row(1)])
    assert len(source.recorded().rows) == 2


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_tabs_of_a_run_are_sections_of_its_report(language: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", long_run(30), status={"status": "running", "total_steps": 40})
    make_comparison(run / "compare")
    page = make_page(recorded_source(run), language=language)
    sections = Sections(page.source, page)
    shown = {name: sections.show(name) for name in (CURVES, DATA, RELEASE)}
    assert shown[CURVES].count("<figure") > 5 and "<svg" in shown[CURVES] and 'id="why"' in shown[CURVES]
    assert 'id="data"' in shown[DATA] and 'id="verdicts"' in shown[RELEASE]
    assert all("<script" not in markup and "<style" not in markup for markup in shown.values())
    for markup in shown.values():
        assert markup.count("<div") == markup.count("</div") and markup.count("<section") == markup.count("</section")
    assert ">30<" in _training(sections, page.words) and page.words("latest_steps") in _training(sections, page.words)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": 0.125}\n')
    assert ">31<" in _training(sections, page.words) and "0.125" in _training(sections, page.words)


def test_a_run_that_is_gone_is_a_sentence(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", long_run(3))
    page = make_page(recorded_source(run))
    sections = Sections(page.source, page)
    assert "<figure" in _training(sections, page.words)
    run.rename(tmp_path / "elsewhere")
    assert "is not there" in html.unescape(_training(sections, page.words))
    assert page.source.recorded().rows == ()


def test_an_adapter_of_no_run_says_so(tmp_path: Path) -> None:
    page = make_page(recorded_source(make_comparison(tmp_path / "c")))
    assert "no run" in _training(Sections(page.source, page), page.words)


def test_the_style_names_both_themes_and_loads_nothing() -> None:
    text = style()
    assert text.count("--ink:") == 2 and "body.dark" in text
    assert "url(" not in text and "@import" not in text and "http" not in text
    assert text.count("{") == text.count("}")


def test_help_imports_neither_torch_nor_gradio() -> None:
    code = (
        "import sys\nfrom eval.cli import main\ntry: main(['app', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'gradio', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(option in result.stdout for option in ("--recorded", "--auth", "--host", "--language"))
