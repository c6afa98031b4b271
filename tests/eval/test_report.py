"""The report of runs in every state: what the page says, how large it is, what it refuses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import add_comparison, long_run, make_run, row

from eval.cli import main
from eval.report.page import page_of
from eval.report.run import read_run
from eval.report.words import LABELS, SENTENCES, words_in

FINISHED = {"status": "finished", "total_steps": 40}
ROWS = [row(step, -0.01 * step, -0.05 * step) for step in range(1, 41)]


class Shown(HTMLParser):
    """The text of a page, without style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden = tag in {"style", "script"}

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.words.append(data)


def text_of(page: str) -> str:
    """What a person reads."""
    return " ".join(" ".join(Shown(page).words).split())


def written(run: Path, *options: str) -> str:
    """The page that the command writes."""
    assert main(["report", str(run), *options]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def test_finished_run_has_its_numbers(tmp_path: Path) -> None:
    rows = [
        *ROWS[:-1],
        ROWS[-1] | {f"eval_{key}": value for key, value in row(40, -0.4, -2.0).items() if key != "step"},
    ]
    text = text_of(written(make_run(tmp_path / "r", rows, status=FINISHED), "--gpu_price_per_hour", "90"))
    for words in (
        "Finished", "org/base-7b", "pairs.jsonl", "NVIDIA H100, 80 GiB", "Steps 40 of 40",
        "Held-out margin 1.6 step 40", "Training time 80 s", "Cost 2.00 at 90 per hour", "ln 2",
        "clipped at 1", "--learning_rate 1e-05",
    ):  # fmt: skip
        assert words in text
    assert "has not written an account of its data" in text
    assert "Not compared yet" in text


def test_time_is_counted_also_between_logged_steps(tmp_path: Path) -> None:
    rows = [row(step, 0, 0) for step in (10, 20, 25)]
    assert read_run(make_run(tmp_path, rows, status=FINISHED)).hours == pytest.approx(25 * 2 / 3600)


@pytest.mark.parametrize(
    ("status", "holder", "state"),
    [
        (None, None, "new"),
        ({"status": "training", "total_steps": 100}, {"pid": os.getpid()}, "going"),
        ({"status": "training", "total_steps": 100}, {"pid": 2**22 + 1}, "stopped"),
        ({"status": "training", "total_steps": 100}, {"pid": 0}, "stopped"),
        ({"status": "training", "total_steps": 100}, {"pid": 1, "host": "elsewhere"}, "going"),
        ({"status": "training", "total_steps": 100}, {}, "stopped"),
        (FINISHED, {}, "finished"),
        (FINISHED, None, "finished"),
    ],
)
def test_state(tmp_path: Path, status: dict[str, object] | None, holder: dict[str, object] | None, state: str) -> None:
    run = make_run(tmp_path, ROWS if status else [], status=status)
    if holder is not None:
        values = {"host": socket.gethostname(), "since": "2026-01-02 03:04:05"} | holder if holder else holder
        (run / ".lock").write_text(json.dumps(values) if values else "")
    found = read_run(run)
    assert found.state == state
    assert ("since 2026-01-02 03:04:05" in text_of(page_of(found))) == (state == "going")
    if state == "going":
        assert "about 2 min left" in text_of(page_of(found))


def test_run_on_another_machine_that_is_silent_has_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, status={"status": "training", "total_steps": 100})
    (run / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "x"}))
    for file in run.iterdir():
        os.utime(file, (time.time() - 7200,) * 2)
    assert read_run(run).state == "stopped"


def test_run_without_a_step(tmp_path: Path) -> None:
    page = written(make_run(tmp_path, [], status={"status": "training", "total_steps": 100}))
    assert "No step has been logged yet" in text_of(page)
    assert "<figure" not in page and 'class="verdict"' not in page
    assert "--learning_rate" in text_of(written(make_run(tmp_path / "new", [])))


def test_run_without_evaluation_shows_training_numbers(tmp_path: Path) -> None:
    text = text_of(written(make_run(tmp_path, ROWS, status=FINISHED)))
    assert "Training margin 1.6" in text
    assert "In the last 20 logged training steps" in text
    assert "held-out" not in text.partition("Curves")[2].partition("Verdicts")[0].replace("of held-out samples", "")


def test_one_step_is_drawn(tmp_path: Path) -> None:
    assert "<circle" in written(make_run(tmp_path, [row(1, 0.0, 0.0)], status=FINISHED))


def test_skipped_steps_are_named_and_leave_gaps(tmp_path: Path) -> None:
    bad = {"loss": float("nan"), "grad_norm": float("inf")}
    rows = [one | bad if one["step"] in (7, 8) else one for one in ROWS]
    page = written(make_run(tmp_path, rows, status=FINISHED))
    assert "2 logged steps did not move the adapter" in text_of(page) and ": 7, 8." in text_of(page)
    assert page.count('class="bad"') >= 2
    drawing = page.partition('id="chart-loss"')[2].partition("</figure>")[0]
    path = drawing.partition('class="line c1" d="')[2].partition('"')[0]
    assert path.count("M") == 2 and path.count("L") == 40 - 2 - 2
    assert "NaN" not in page and ">nan<" not in page


def test_torn_last_line_is_left_out_silently_and_others_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, status=FINISHED)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')
    assert read_run(run).steps == 40 and read_run(run).notes == []
    (run / "metrics.jsonl").write_text(f'{json.dumps(ROWS[0])}\n\x00\x00{{"step"\n3\n{json.dumps(ROWS[2])}\n')
    assert [one["step"] for one in read_run(run).metrics] == [1, 3]
    assert "metrics.jsonl: 2 of 4 lines cannot be read, the first is line 2." in text_of(written(run))


def test_steps_that_stand_twice_are_drawn_once(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, [row(1, 0, 0), row(2, 0, 0), row(2, -1, -2), row(3, 0, 0) | {"step": "x"}], status=FINISHED
    )
    assert [(one["step"], one["rewards/chosen"]) for one in read_run(run).metrics] == [(1, 0), (2, -1)]


def test_foreign_values_do_not_end_in_a_traceback(tmp_path: Path) -> None:
    rows = [row(1, 0, 0) | {"loss": "x", "grad_norm": None, "loss/": 1, "count/": 10**400, "memory/peak_gib": True}]
    status = {"status": 3, "total_steps": "many", "environment": [], "changed": [4, {"step": 1}]}
    run = make_run(tmp_path, rows, config={"beta": "x", "loss_type": None, "max_grad_norm": []}, status=status)
    for name in ("data.json", "merge_report.json", "before_after.json"):
        (run / name).write_text('{"sources": [3], "lint": 4, "answers": [5, {}], "candidates": [{}], "x": {"y": {}}}')
    (run / "compare").mkdir()
    (run / "compare" / "summary.json").write_text('{"verdicts": {"a": {"interval": 3}, "b": 4}, "rates": [], "kl": 2}')
    assert "Left out" not in text_of(written(run))


def test_broken_files_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, status=FINISHED)
    (run / "merge_report.json").write_text("{")
    (run / "data.json").write_text("[]")
    add_comparison(run / "compare", [("a", "b", "c", "d")])
    (run / "compare" / "verdicts.jsonl").write_text('{"id": 3}\n')
    text = text_of(written(run))
    assert "merge_report.json cannot be read" in text and "data.json holds no object" in text
    assert "verdicts.jsonl:1: not a verdict" in text


def test_comparison_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, status=FINISHED)
    add_comparison(tmp_path / "elsewhere", [("qa", f"Question {n}?", "No.", "Yes, it is.") for n in range(30)])
    text = text_of(written(run, "--comparison", str(tmp_path / "elsewhere")))
    for words in (
        "Win rate (rule:chrf) 67.0 % 61.4 % … 72.1 %", "171 · 60 · 69", "61.2 % 55.3 % … 66.8 %", "0.113 0.081 … 0.146",
        "rule:chrf: by category", "summarization 30 · 25 · 35 47.2 %", "missing end 2.0 % 3.0 %",
        "mean tokens 41.2 77.9",
        "implicit reward −0.12 0.84", "facts stated 90.0 % 88.0 %", "facts kept 88 of 90 (92.3 % … 99.4 %)",
        "KL to the reference per answer 8.42", "12 of 30", "Question 0?", "Yes, it is.", "log-prob −0.8 per token",
    ):  # fmt: skip
        assert words in text
    assert main(["report", str(run), "--comparison", str(tmp_path)]) == 74


def test_data_samples_and_merge_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, status=FINISHED)
    (run / "data.json").write_text(json.dumps(DATA))
    (run / "samples.jsonl").write_text(
        "".join(json.dumps({"step": n, "prompt": "Why?", "before": "b", "after": f"now {n}"}) + "\n" for n in (20, 40))
    )
    (run / "merge_report.json").write_text(json.dumps({"chosen": "train", "candidates": [{"kl": 0.001}, {"kl": 0.02}]}))
    text = text_of(written(run))
    for words in (
        "rows read 20,000", "repaired: spoke twice 3", "refused: histories differ 401",
        "truncated answers 310", "19 to train on, 2 held out",
        "duplicate_prompt 219 keep one", "now 40", "step 20 now 20", "Merge fidelity chosen train", "0.001",
    ):  # fmt: skip
        assert words in text


def test_merge_report_reads_well(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, status=FINISHED)
    candidates = [
        {"name": "train, bfloat16", "kl_mean": 0.001, "problems": [], "warnings": []},
        {"name": "original, bfloat16", "kl_mean": None, "problems": ["it is lost", "it is gone"], "warnings": []},
    ]
    layers = [{"name": f"layer {number}", "size": 0.1} for number in range(13)]
    facts = {"pairs": 64, "notes": ["The adapter is untrained."]}
    report = {"chosen": "train, bfloat16", "yardstick": facts, "candidates": candidates, "layers": layers}
    (run / "merge_report.json").write_text(json.dumps(report))
    page = written(run)
    text = text_of(page)
    assert "yardstick: pairs 64 yardstick: notes The adapter is untrained." in text
    assert "name kl mean problems train, bfloat16 0.001 – original, bfloat16 – it is lost; it is gone" in text
    assert "<details><summary>layers</summary><table>" in page and "<h3>candidates</h3><table>" in page


DATA = {
    "train": 19, "held_out": 2,
    "sources": [
        {"source": "a.jsonl", "dataset_format": "hh-rlhf", "rows_read": 20000, "pairs": 19000,
         "refused": {"histories differ": 401}, "repaired": {"spoke twice": 3}, "truncated_completions": 310},
    ],
    "lint": {"rules": {"duplicate_prompt": {"blocks": False, "count": 219, "advice": "keep one"}}},
}  # fmt: skip


def test_card_tells_about_the_data_of_older_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, status=FINISHED)
    (run / "README.md").write_text("# x\n\n## Data\n\n- a.jsonl: 9 pairs\n- refused: 1 row\n\n## Settings\n\n- no\n")
    assert read_run(run).data_lines == ["a.jsonl: 9 pairs", "refused: 1 row"]
    assert "refused: 1 row" in text_of(written(run))


def test_rejected_answers_per_token_and_lengths_are_drawn_where_they_are_logged(tmp_path: Path) -> None:
    more = {"displacement/rejected_per_token": -0.3, "lengths/chosen": 40.0, "lengths/rejected": 60.0}
    run = read_run(make_run(tmp_path, [one | more for one in ROWS], status=FINISHED))
    text = text_of(page_of(run))
    assert "chosen −0.08 rejected −0.3" in text and "chosen 40 rejected 60" in text
    assert "Change of log-prob per answer" not in text
    assert "Change of log-prob per answer" in text_of(page_of(read_run(make_run(tmp_path, ROWS, status=FINISHED))))


def test_sft_run(tmp_path: Path) -> None:
    rows = [
        {"step": step, "loss": 2 / step, "mean_token_accuracy": 0.5, "supervised_tokens": 100.0, "step_seconds": 1.0,
         "tokens_per_second": 90.0, "conversations_per_second": 3.0}
        for step in range(1, 9)
    ]  # fmt: skip
    page = written(make_run(tmp_path, rows, config={"objective": "sft"}, status=FINISHED))
    text = text_of(page)
    assert "SFT on conversations" in text and "Token accuracy" in text and "per conversation 30" in text
    assert "ln 2" not in text and "chosen" not in text.partition("Settings")[0]


@pytest.mark.parametrize(
    ("path", "words"),
    [("gone", "is not there"), ("file", "is a file but no run"), ("folder", "is a folder but no run")],
)
def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, words: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    assert main(["report", str(tmp_path / path)]) == 74
    assert words in capsys.readouterr().err


def test_broken_config_and_wrong_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "r", ROWS)
    assert main(["report", str(run), "--gpu_price_per_hour", "-1"]) == 2
    assert main(["report", str(run), "--language", "fr"]) == 2
    assert main(["report", str(run), "--output", str(run / "config.yaml" / "x.html")]) == 74
    (run / "config.yaml").write_text("a: [")
    assert main(["report", str(run)]) == 74
    assert "config.yaml cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", long_run(300), status=FINISHED)
    assert main(["report", str(run), "--png", str(tmp_path / "png"), "--language", "zh"]) == 0
    files = {file.stem for file in (tmp_path / "png").iterdir() if file.read_bytes()[:4] == b"\x89PNG"}
    assert {"loss", "rewards", "margins", "accuracies", "shift_per_token", "grad_norm", "memory", "speed"} <= files


def test_chinese_page(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, long_run(30, categories=("qa", "数学")), status=FINISHED))
    text = text_of(page_of(run, language="zh"))
    assert "为什么我的被选奖励是负的？" in text and "奖励差" in text and "数学" in text
    assert "Training time" not in text
    assert '<html lang="zh-Hans">' in page_of(run, language="zh")


def test_both_languages_say_the_same_things() -> None:
    import string

    for name, texts in (LABELS | SENTENCES).items():
        fields = [sorted({part[1] for part in string.Formatter().parse(one) if part[1]}) for one in texts]
        assert fields[0] == fields[1], name
        links = [sorted(one.count(f"[[{part}") for part in ("beta", "learning_rate", "loss_type")) for one in texts]
        assert links[0] == links[1], name
    assert words_in("zh")("tokens", count=3) == "3 词元"


def test_secrets_are_hidden(tmp_path: Path) -> None:
    run = make_run(tmp_path, ROWS, config={"dataset": "https://me:pass1234@host/x"}, status=FINISHED)
    page = written(run)
    assert "pass1234" not in page and "***@host" in page


@pytest.mark.slow
def test_report_of_a_long_run_is_small_and_fast_and_needs_no_torch(tmp_path: Path) -> None:
    run = make_run(tmp_path, long_run(10_000, categories=("a", "b", "c", "d")), status=FINISHED)
    code = (
        f"import sys; from eval.cli import main; code = main(['report', {str(run)!r}]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
    assert time.monotonic() - begin < 10
    assert (run / "report.html").stat().st_size < 5_000_000
