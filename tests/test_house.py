"""The house: imports point one way, importing has no effects, every option is read, the docs name what exists."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from eval.cli import COMMANDS as EVAL_COMMANDS
from qlora_dpo.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    "errors",
    "files",
    "redaction",
    "terminal",
    "config",
    "endpoint",
    "environment",
    "pages",
    "objectives",
    "data",
    "models",
    "reference",
    "training",
    "scoring",
    "release",
    "labeling",
    "demo",
    "help_text",
    "command_line",
    "cli",
]
OPTION_GROUPS = {group for command in (COMMANDS | EVAL_COMMANDS).values() for group in command.options}
MODULES, EVAL_MODULES = (
    sorted(path for path in (ROOT / package).rglob("*.py") if "__pycache__" not in path.parts)
    for package in ("qlora_dpo", "eval")
)


def floor_of(module: str) -> int:
    return FLOORS.index(module)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    place = path.relative_to(ROOT / "qlora_dpo").parts[0].removesuffix(".py")
    if place in {"__init__", "__main__"}:
        return
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top not in {"eval", "rlhf", "trl"}, f"{path} imports {name}"
        if top == "qlora_dpo" and rest:
            assert floor_of(rest.split(".")[0]) <= floor_of(place), f"{path} imports {name}, which lies above it"


def test_every_folder_has_its_floor() -> None:
    folders = {
        path.name for path in (ROOT / "qlora_dpo").iterdir() if path.is_dir() and (path / "__init__.py").is_file()
    }
    assert folders <= set(FLOORS)


def test_every_module_can_be_imported_and_has_no_effects(tmp_path: Path) -> None:
    every = [*MODULES, *EVAL_MODULES]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in every if path.stem != "__main__"]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "qlora_dpo", "qlora_dpo train", "qlora_dpo plan", "qlora_dpo score", "qlora_dpo merge", "qlora_dpo env",
        "eval", "eval app", "eval compare", "eval gate", "eval report",
    ],
)  # fmt: skip
def test_help_is_fast_and_imports_no_torch(command: str) -> None:
    program, *rest = command.split()
    code = (
        f"import sys; from {program}.cli import main\n"
        f"try: main({[*rest, '--help']!r})\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout
    # Processor time, not wall time: the machine may be busy with other tests.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_every_option_is_read_somewhere() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in [*MODULES, *EVAL_MODULES]}
    is_option_file = {path: path.parent.name == "config" or path.name == "options.py" for path in sources}
    text = "\n".join(code for path, code in sources.items() if not is_option_file[path])
    text += (ROOT / "qlora_dpo/config/checks.py").read_text(encoding="utf-8")
    text += (ROOT / "qlora_dpo/config/training.py").read_text(encoding="utf-8").partition("class TrainConfig")[2]
    for group in OPTION_GROUPS:
        for option in fields(group):
            assert re.search(rf"\.{option.name}\b", text), f"--{option.name} is read by nothing"


def test_every_option_has_help() -> None:
    for group in OPTION_GROUPS:
        tree = ast.parse((ROOT / (group.__module__.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == group.__name__)
        documented = {
            statement.target.id
            for statement, after in pairwise(body)
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        }  # fmt: skip
        assert documented == {option.name for option in fields(group)}
