"""Programs of the repository that are run as they are on this machine: the tests that need a GPU, and the demo."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.rows import Row
from benchmarks.processes import ROOT

LONGEST = 400  # characters of a program's last words


def run_gpu_tests(limit: float) -> Iterator[Row]:
    """The tests marked `gpu`, by file, so that nothing else of the tests has to be importable here."""
    files = sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if "mark.gpu" in file.read_text(encoding="utf-8") and file.parent.name != "benchmarks"
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Other versions of libraries warn of other things: warnings are no errors here.
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=",
                   f"--junitxml={report}", *files]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        if not report.is_file():
            yield Row("checks", "tests marked gpu", note=(done.stdout + done.stderr).strip()[-LONGEST:])
            return
        counts, failed = read_report(report.read_text(encoding="utf-8"))
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count or kind == "passed")
    values = {
        "passed": not failed and counts["passed"] > 0,
        "found": words + (f": {', '.join(failed)}" if failed else ""),
        "limit": "all pass",
        "how": f"pytest -m gpu in {len(files)} files",
    }
    yield Row("checks", "tests marked gpu", values)


def read_report(xml: str) -> tuple[dict[str, int], list[str]]:
    """How many tests passed, failed and were skipped, and the names of those that failed."""
    counts, failed = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        broken = case.find("failure") is not None or case.find("error") is not None
        kind = "failed" if broken else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        failed += [str(case.get("name"))] if broken else []
    return counts, failed


def run_demo(limit: float) -> Iterator[Row]:
    """The embedded demo on this machine's device: its seconds and what its gate says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "eval", "demo", "--output_dir", f"{folder}/run"]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
        seconds = time.perf_counter() - started
    values = {
        "passed": done.returncode == 0,
        "found": f"{seconds:.1f} s; {gate_words(done.stdout) or (done.stderr.strip() or 'no output')[-LONGEST:]}",
        "limit": "its gate",
        "how": "python -m eval demo",
        "gate": done.stdout[-2000:],
        "seconds": seconds,
    }
    yield Row("checks", "demo", values)


def gate_words(output: str) -> str:
    """The numbers that the demo prints last, in a line."""
    wanted = ("Held-out reward accuracy", "From terse to explained", "Facts right before and after")
    found = [re.sub(r"\s{2,}", " ", line.strip()) for line in output.splitlines() if line.startswith(wanted)]
    return "; ".join(found)
