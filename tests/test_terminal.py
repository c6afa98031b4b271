"""What commands write: nothing steers the terminal, a reader may leave, a full disk is said or outlasted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main
from qlora_dpo.command_line import Command, run_commands
from qlora_dpo.terminal import CLOSED_PIPE, guarded_output, print_colored, visible, visible_lines

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
TITLE, CLEAR, C1, BIDI = "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202e"
HOSTILE = f"{TITLE}{CLEAR}{C1}{BIDI}\r"


def exit_code(*arguments: str | Path, **streams: Any) -> int:
    command = [sys.executable, "-m", "qlora_dpo", *map(str, arguments)]
    return subprocess.run(command, check=False, **({"stdout": subprocess.DEVNULL} | streams)).returncode


@needs_full
def test_error_that_nobody_can_read_keeps_its_exit_code() -> None:
    with FULL.open("w") as log:
        assert exit_code("train", "--bta", "1", stderr=log) == 2


@needs_full
def test_results_that_cannot_be_written_are_an_error() -> None:
    with FULL.open("w") as results:
        for words in (["--help"], ["train", "--help"], ["env"]):
            assert exit_code(*words, stdout=results, stderr=subprocess.DEVNULL) == 74


@needs_full
@pytest.mark.slow
def test_run_whose_log_is_on_a_full_disk_comes_to_its_end(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--model_name_or_path", model_folder, "--dataset", pairs_file, "--output_dir", run, "--max_steps", "2"]
    with FULL.open("w") as log:
        assert exit_code("train", *options, stderr=log) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("line", "code", "unbuffered"),
    [
        ("qlora_dpo --help", CLOSED_PIPE, ""),
        ("qlora_dpo --help", CLOSED_PIPE, "1"),
        ("qlora_dpo data lint --help", 0, ""),
        ("qlora_dpo data lint PAIRS", CLOSED_PIPE, ""),
        ("qlora_dpo data lint BAD", 65, "1"),
        ("eval --help", CLOSED_PIPE, ""),
    ],
)
def test_a_reader_that_leaves_ends_a_command_quietly(
    line: str, code: int, unbuffered: str, pairs_file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "chosen": "b", "rejected": "\u200b"}\n')
    words = line.replace("PAIRS", str(pairs_file)).replace("BAD", str(bad)).split()
    reader, writer = os.pipe()
    os.close(reader)  # before anything is written, as `| true` may
    result = subprocess.run(
        [sys.executable, "-m", *words], stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert result.returncode == code
    assert "BrokenPipe" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert bool(result.stderr) == (code == 65)


def test_a_command_goes_on_when_its_reader_leaves(
    pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    output = tmp_path / "lint.json"
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert main(["data", "lint", str(pairs_file), "--json", str(output)]) == CLOSED_PIPE
    assert json.loads(output.read_text())["pairs"] == len(pairs_file.read_text().splitlines())


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert visible(HOSTILE) == r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"
    assert visible_lines(f"a\n\tb{BIDI}") == "a\n\tb\\u202e"
    assert visible("你好 🎉 naïve \ud800") == "你好 🎉 naïve \\ud800"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_only_lines_colors_and_progress_bars_pass(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(f"sys.{stream}", written)
    with guarded_output():
        print(f"a {HOSTILE} b\n\tc \ud800", file=getattr(sys, stream))
        getattr(sys, stream).write("\rtokenizing: 3 rows")
        getattr(sys, stream).write("\x1b[A\x1b[A")
        getattr(sys, stream).write("\x1b[31;1mred\x1b[0m \x1b[8mhidden\n")
    shown = f"a {visible(HOSTILE)} b\n\tc \\ud800\n\rtokenizing: 3 rows\x1b[A\x1b[A"
    red = "\x1b[31;1mred\x1b[0m" if stream == "stderr" else r"\x1b[31;1mred\x1b[0m"
    assert written.getvalue() == f"{shown}{red} \\x1b[8mhidden\n"


def test_colors_of_the_tool_itself_reach_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    with guarded_output():
        print_colored("\x1b[32mgreen\x1b[0m")
    print_colored("\x1b[32mgreen\x1b[0m")
    assert written.getvalue() == "\x1b[32mgreen\x1b[0m\n" * 2


def test_text_that_an_ascii_stream_cannot_hold_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, "ascii"))
    assert run_commands("x", {"say": Command("Say.", (), lambda: print("你好"))}, ["say"]) == 0
    assert raw.getvalue() == b"\\u4f60\\u597d\n"
