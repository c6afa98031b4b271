"""Labels by people: blind orders, keys, undo, several annotators, a page that shows text and never HTML."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from visitors import config_of

from qlora_dpo.cli import main
from qlora_dpo.errors import Interrupted
from qlora_dpo.labeling.annotation import Annotation, View
from qlora_dpo.labeling.records import Candidates, Record, finish, load_candidates

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
EVIL = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
ITEMS = [Candidates(f"p{n}", (f"a{n}", f"b{n}"), origin=f"f:{n}") for n in range(4)]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "pairs.labels.jsonl")


def choose(annotation: Annotation, view: View, answer: str) -> View:
    return annotation.act(str(view.answers.index(answer) + 1), view.key)


def test_keys_label_skip_and_undo(record: Record) -> None:
    annotation = Annotation([*ITEMS, replace(ITEMS[0], origin="again")], record, "ann")
    view = annotation.view()
    assert (view.prompt, sorted(view.answers), view.progress) == ("p0", ["a0", "b0"], "0 of 4 labelled by ann")
    view = choose(annotation, view, "b0")
    assert view.prompt == "p1" and record.verdicts()[ITEMS[0].key, "ann"].chosen == 1
    view = annotation.act("s", view.key)
    assert view.prompt == "p2" and "Skipped" in view.message
    view = annotation.act("0", view.key)
    assert view.prompt == "p3" and record.verdicts()[ITEMS[2].key, "ann"].is_tie
    view = annotation.act("u", view.key)
    assert view.prompt == "p2" and len(record.verdicts()) == 1 and "Undone" in view.message
    view = annotation.act("u", view.key)
    assert view.prompt == "p0" and record.verdicts() == {}
    assert "nothing to undo" in annotation.act("u", view.key).message
    for answer in ("a0", "a2", "a3", "a1"):  # the skipped one comes last
        view = choose(annotation, view, answer)
    assert view.key == "" and "All done" in view.message and view.progress == "4 of 4 labelled by ann"
    assert {verdict.chosen for verdict in record.verdicts().values()} == {0}
    assert annotation.act("1", "").message.startswith("These answers are not to be labelled here")
    assert annotation.act("u", "").prompt == "p1"


def test_the_page_goes_on_where_it_was(record: Record) -> None:
    first = Annotation(ITEMS, record, "ann")
    shown = choose(first, first.view(), "a0")
    again = Annotation(ITEMS, Record(record.file), "ann")
    assert again.view() == replace(shown, message="")
    assert again.act("u", "").prompt == "p0"


def test_a_press_is_about_the_answers_that_were_seen(record: Record) -> None:
    annotation = Annotation(ITEMS, record, "ann")
    seen = annotation.view()
    choose(annotation, seen, "a0")
    choose(annotation, seen, "b0")  # a second press before the page has changed
    assert [(verdict.key, verdict.chosen) for verdict in record.verdicts().values()] == [(ITEMS[0].key, 1)]
    assert annotation.view().progress.startswith("1 of 4")
    assert annotation.act("3", ITEMS[1].key).message == "There are 2 answers."


def test_of_more_than_two_answers_the_best_and_the_worst(record: Record) -> None:
    item = Candidates(({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), ("a", "b", "c"))
    annotation = Annotation([item, ITEMS[0]], record, "ann")
    view = annotation.view()
    assert view.prompt == "system:\ns\n\nuser:\nu" and annotation.longest == 3
    view = choose(annotation, view, "c")
    assert "Which one is the worst" in view.message and view.best == view.answers.index("c")
    assert "another answer" in choose(annotation, view, "c").message
    view = annotation.act("u", view.key)
    assert view.best is None and record.verdicts() == {}
    view = choose(annotation, view, "b")
    view = choose(annotation, view, "a")
    verdict = record.verdicts()[item.key, "ann"]
    assert (verdict.chosen, verdict.rejected, verdict.method) == (1, 0, "human") and view.prompt == "p0"


def test_each_annotator_has_an_order_of_their_own(record: Record) -> None:
    items = [Candidates(f"p{n}", ("a", "b")) for n in range(200)]

    def orders(name: str) -> list[tuple[str, ...]]:
        annotation, shown = Annotation(items, record, name), []
        for _ in items:
            view = annotation.view()
            shown.append(view.answers)
            annotation.act("s", view.key)
        return shown

    ann, ben = orders("ann"), orders("ben")
    assert 70 < ann.count(("a", "b")) < 130 and 70 < sum(x == y for x, y in zip(ann, ben, strict=True)) < 130
    assert orders("ann" + " 2") != ann


def test_the_majority_of_several_annotators_makes_the_pairs(record: Record, tmp_path: Path) -> None:
    votes = {"ann": "abat", "ben": "abbt", "cem": "aaba"}
    for name, letters in votes.items():
        annotation = Annotation(ITEMS, Record(record.file), name)
        for number, letter in enumerate(letters):
            view = annotation.view()
            if letter == "t":
                annotation.act("0", view.key)
            else:
                choose(annotation, view, f"{letter}{number}")
    view = Annotation(ITEMS, record, "ann").view()
    assert view.agreement.startswith("3 annotators (ann, ben, cem) agree on 1 of 4 sets of answers, Krippendorff's")
    output = tmp_path / "pairs.jsonl"
    summary = finish(output, ITEMS, record.verdicts())
    assert (summary.pairs, summary.ties) == (3, 1)
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(pair["chosen"], pair["confidence"]) for pair in pairs] == [
        ("a0", 1.0), ("b1", pytest.approx(2 / 3)), ("b2", pytest.approx(2 / 3)),
    ]  # fmt: skip
    assert pairs[0]["label"]["annotators"] == ["ann", "ben", "cem"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--annotator", "<b>"], "--annotator"),
        (["--annotator", ""], "--annotator"),
        (["--annotator", "ann", "--port", "70000"], "--port 70000"),
        (["--annotator", "ann", "--output", "pairs.csv"], ".jsonl"),
        (["--annotator", "ann"], "10 answers to one prompt"),
    ],
)
def test_options_that_cannot_work_are_refused(
    tmp_path: Path, options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "c.jsonl"
    source.write_text(json.dumps({"prompt": "p", "answers": [str(n) for n in range(10)]}) + "\n")
    arguments = ["--candidates", str(source), "--output", str(tmp_path / "pairs.jsonl"), *options]
    assert main(["label", "human", *arguments]) == 2
    assert told in capsys.readouterr().err


@contextmanager
def served(source: Path, output: Path, annotator: str) -> Iterator[str]:
    """A real server, ended as a user or a job scheduler does."""
    log = output.with_name(f"{annotator}.log")
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    arguments = ["--candidates", str(source), "--output", str(output), "--annotator", annotator, "--port", "0"]
    with log.open("w") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_dpo", "label", "human", *arguments],
            cwd=ROOT, env=environment, stdout=stdout, stderr=stdout,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        address = None
        while address is None and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.3)
            address = re.search(r"http://[\d.]+:\d+", log.read_text())
        assert address is not None, log.read_text()
        yield address[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == Interrupted.exit_code, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait(20)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{EVIL} p{n}", "chosen": f"good {n} {EVIL}", "rejected": f"bad {n} {EVIL}"} for n in range(3)]
    file = tmp_path / "source.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def press(address: str, action: str, key: str) -> list[Any]:
    """Press a button as the page does, without a browser."""

    def fetch(path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{address}/{path}", data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=60)

    rows = config_of(address)["dependencies"]
    number = next(row["id"] for row in rows if row["api_name"] == action)
    body = {"data": [key] if key or action.startswith("press") else [], "fn_index": number, "session_hash": "s"}
    fetch("gradio_api/queue/join", body).close()
    with fetch("gradio_api/queue/data?session_hash=s") as events:
        for line in events:
            if b"process_completed" in line:
                event = json.loads(line.removeprefix(b"data: "))
                break
    assert event["success"], event
    data: list[Any] = event["output"]["data"]
    return data


@pytest.mark.slow
def test_the_served_page_is_local_labels_and_writes_pairs_when_it_ends(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    keys = [item.key for item in load_candidates(str(source))]
    with served(source, output, "ann") as address:
        assert address.startswith("http://127.0.0.1:")  # whatever GRADIO_SHARE and GRADIO_SERVER_NAME say
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{address}/gradio_api/file={source}", timeout=20)
        assert error.value.code in {403, 404}
        error.value.close()
        shown = press(address, "press_1", keys[0])
        assert shown[0] == keys[1] and shown[3] == "1 of 3 labelled by ann"
        assert press(address, "press_0", keys[1])[0] == keys[2]
        assert press(address, "press_u", keys[2])[0] == keys[1]
        assert press(address, "press_2", "no such answers")[3] == "1 of 3 labelled by ann"
    assert len(output.read_text().splitlines()) == 1
    record = tmp_path / "pairs.labels.jsonl"
    assert [json.loads(line)["annotator"] for line in record.read_text().splitlines()] == ["ann"] * 3


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}")
def test_a_person_labels_with_the_keyboard(source: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    output = tmp_path / "pairs.jsonl"
    with served(source, output, "ann") as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        try:
            label_three_with_the_keyboard(browser.new_page(), address, playwright.expect)
        finally:
            browser.close()
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [pair["chosen"].split()[0] for pair in pairs] == ["good", "good"]


def label_three_with_the_keyboard(page: Any, address: str, expect: Any) -> None:
    """Good, tie and back, good after a skip, tie."""
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    progress, prompt = page.locator("#label-progress textarea"), page.locator("#label-prompt textarea")
    expect(progress).to_have_value("0 of 3 labelled by ann", timeout=30_000)
    expect(prompt).to_have_value(f"{EVIL} p0")
    for hint in ("[1]", "[2]", "[0]", "[s]", "[u]"):
        expect(page.get_by_role("button").filter(has_text=hint)).to_be_visible()

    def good() -> str:
        """The key of the good answer."""
        first = page.locator("#label-answer-1 textarea").input_value()
        return "1" if first.startswith("good") else "2"

    page.keyboard.press(good())
    expect(progress).to_have_value("1 of 3 labelled by ann")
    expect(prompt).to_have_value(f"{EVIL} p1")
    page.keyboard.press("0")
    expect(progress).to_have_value("2 of 3 labelled by ann")
    page.keyboard.press("u")
    expect(prompt).to_have_value(f"{EVIL} p1")
    page.keyboard.press("s")
    expect(prompt).to_have_value(f"{EVIL} p2")
    page.keyboard.press(good())
    expect(prompt).to_have_value(f"{EVIL} p1")
    page.keyboard.press("Control+1")  # a shortcut of the browser, not of the page
    page.keyboard.press("0")
    expect(page.locator("#label-message textarea")).to_have_value(re.compile("All done"))
    expect(progress).to_have_value("3 of 3 labelled by ann")
    assert page.title() == "Which answer is better?" and page.locator("img[src=x]").count() == 0
    assert problems == []
