"""README stays true: its commands run, its links exist, its numbers are those of the results."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import forks
import pytest

from benchmarks.vs_trl import read_row

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def commands(path: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def run(command: str, folder: Path, names: dict[str, Path], started: set[str]) -> None:
    """Run a README command in `folder`, with the example names filled in and this Python as its environment; a program
    that was `started` before in a process that is forked."""
    trains = re.search(r"run_dpo_training.sh|qlora_dpo (train|plan)", command) and "MODEL" in command
    command += " --max_steps 2 --dtype float32" if trains else ""
    for name, path in names.items():
        command = re.sub(rf"\b{name}\b", str(path), command)
    command = re.sub(r"^\./", f"{ROOT}/", command)
    command = re.sub(r"^python ", f"{sys.executable} ", command)
    environment = os.environ | {"QLORA_DPO_VENV": sys.prefix, "PYTHONPATH": str(ROOT)}
    if " app " in command:
        check_served(command + " --port 0", folder, environment)
        return
    program = re.fullmatch(r"\S*python -m (qlora_dpo|eval) (.*)", command)
    if program and program[1] in started:  # python itself needs no second test
        result = forks.run(shlex.split(program[2]), folder, program=program[1], before=partial(os.chdir, folder))
    else:
        result = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
    started |= {program[1]} if program else set()
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


def check_served(command: str, folder: Path, environment: dict[str, str]) -> None:
    log = folder / "served.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, shell=True, cwd=folder, env=environment | {"PYTHONUNBUFFERED": "1"}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while "http://127.0.0.1" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    assert "http://127.0.0.1" in log.read_text(), log.read_text()


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path, model_folder: Path, pairs_file: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "w3 w4", "std_answer": "w5 w6"}\n{"question": "w7", "std_answer": ""}\n')
    names, ran = {"MODEL": model_folder, "PAIRS": pairs_file, "QUESTIONS": questions}, []
    started: set[str] = set()
    for command in commands(READMES[0]):
        if "run_tests.sh" in command:
            continue  # it is running right now
        run(command, tmp_path, names, started)
        ran.append(command)
    assert "./run_dpo_training.sh" in ran and len(ran) >= 5


def test_chinese_readme_has_the_same_commands() -> None:
    assert set(commands(READMES[1])) <= set(commands(READMES[0]))


@pytest.mark.parametrize(
    "path", [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_links_and_named_paths_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), f"{path.name} links to {target}"
    for name in re.findall(r"`((?:qlora_dpo|eval|tests|benchmarks|docs)/[\w/]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_flags_named_in_the_documents_exist() -> None:
    from dataclasses import fields

    from eval.cli import COMMANDS as EVAL_COMMANDS
    from qlora_dpo.cli import COMMANDS

    commands = (COMMANDS | EVAL_COMMANDS).values()
    known = {option.name for command in commands for group in command.options for option in fields(group)}
    known |= {"help", "config", "quick", "strict", "chaos", "only", "reduced", "break"}  # of the scripts
    # Of accelerate, SkyPilot and llama.cpp's converter; other programs' flags have hyphens.
    known |= {"config_file", "num_processes", "env", "outfile", "outtype"}
    for path in [*READMES, *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8").replace("\\_", "_")
        for flag in re.findall(r"(?<![\w-])--([a-z_0-9]+)(?![\w-])", text):
            assert flag in known, f"{path.name} names --{flag}"


def test_measured_numbers_are_those_of_the_results() -> None:
    text = READMES[0].read_text(encoding="utf-8")
    startup = json.loads((ROOT / "benchmarks/results/startup.json").read_text())
    median = sorted(startup["load_seconds"])[len(startup["load_seconds"]) // 2]
    assert f"{median:.0f} s (217 M)" in text and round(startup["parameters"] / 1e6) == 217
    slowest = max(max(seconds) for seconds in startup["help_seconds"].values())
    assert slowest < 1.0 and median < 20
    for workload in ("multi_turn", "belle", "long_prompt", "vocabulary_152k"):
        against_trl = json.loads((ROOT / f"benchmarks/results/vs_trl_{workload}.json").read_text())
        for row in against_trl["rows"]:
            reading = read_row(row, against_trl)
            assert f"{reading['median']:.1f} s" in text and f"{reading['peak_gib']:.1f} GiB" in text, row["name"]
    compare = json.loads((ROOT / "benchmarks/results/compare_speed.json").read_text())["runs"]
    for run_of in compare.values():
        assert f"{run_of['seconds']:.0f} s" in text
    lint = json.loads((ROOT / "benchmarks/results/lint_speed.json").read_text())["runs"]
    for name in ("lint, first", "inspect, first"):
        assert f"{lint[name]['seconds']:.0f} s, {lint[name]['peak_gb']:.1f} GB" in text, name
    page = json.loads((ROOT / "benchmarks/results/page_speed.json").read_text())["rounds"]
    paint, token = (sorted(one[name] for one in page)[len(page) // 2] for name in ("first paint", "first token"))
    assert f"{paint:.1f} s, {token:.1f} s; all answered" in text
    merges = (ROOT / "benchmarks/results/merge_memory.md").read_text()
    peaks = sorted(re.findall(r"float\d+ \|(?: [\d.]+ \|){3} ([\d.]+)", merges))
    assert len(peaks) == 4 and f"{peaks[0]} to {peaks[-1]} GiB peak" in text
    rows = json.loads((ROOT / "benchmarks/results/data_speed.json").read_text())
    assert "LLaMA" in json.dumps(rows)


def test_contributing_fits_on_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
