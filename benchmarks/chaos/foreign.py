"""Other people's folders and files in the way of a command: every byte of them stays, and nothing is a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.bench import Bench, Row, call, counted, last_line
from benchmarks.chaos.breakages import BREAKAGES
from benchmarks.chaos.workload import Workload

REFUSED = (2, 65, 74)  # the command, the content of a file, a file or folder
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
RULES = "- {rule: length, weight: 1, max: 9}\n"
NOTES = "my notes\nwithout an end"
ZIP = "PK\3\4 photos"
RUN: Mapping[str, str] = {
    "run/run.json": json.dumps({"status": "training", "run_id": "0123456789abcdef", "total_steps": 6}),
    "run/config.yaml": "seed: 42\n",
    "run/metrics.jsonl": '{"step": 1, "loss": 0.5}\n',
    "run/checkpoint-3/optimizer.pt": "o",
}
TRAIN = "train --model_name_or_path MODEL --dataset pairs.jsonl --output_dir run"
LABEL = "label rules --candidates pairs.jsonl --rules rules.yaml --output"
CONVERT = "data convert pairs.jsonl --to messages --output"


@dataclass(frozen=True)
class Scene:
    """What lies there, and a command that could write over it."""

    command: str
    files: Mapping[str, str] = field(default_factory=dict)
    """Content by name, beside the pairs and rules that are always there; another program's but for those of `RUN`."""
    soft: Mapping[str, str] = field(default_factory=dict)
    """Links by name: to what."""
    hard: Mapping[str, str] = field(default_factory=dict)
    home: str | None = None
    """The folder that is the user's home."""
    prepare: Callable[[], object] = lambda: None


def _database() -> None:
    with contextlib.closing(sqlite3.connect("calls.sqlite")) as database:
        database.execute("CREATE TABLE photos (name TEXT)")
        database.commit()


def _store() -> None:
    from qlora_dpo.reference.store import ReferenceStore

    ReferenceStore.open(Path("store.sqlite")).close()


def _export_and_database() -> None:
    _store()
    run("reference export store.sqlite rows.parquet".split())
    _database()


SCENES: dict[str, Scene] = {
    "a config.yaml of another program, --fresh": Scene(
        f"{TRAIN} --fresh", {"run/config.yaml": "important: thesis\n", "run/photos.zip": ZIP, "run/.git/config": "[a]"}
    ),
    "a config.yaml of another program": Scene(TRAIN, {"run/config.yaml": "important: thesis\n"}),
    "a run.json of another program": Scene(
        f"{TRAIN} --fresh", {"run/photos.zip": ZIP, "run/run.json": '{"status": "ok"}', "run/config.yaml": "a: 1\n"}
    ),
    "photos in a run, --fresh": Scene(
        f"{TRAIN} --fresh",
        {**RUN, "run/photos.zip": ZIP, "run/checkpoint-3/notes.txt": NOTES, "run/pairs/mine.jsonl": PAIR},
    ),
    "a card that somebody wrote, --fresh": Scene(f"{TRAIN} --fresh", {**RUN, "run/README.md": NOTES}),
    "a repository in a run, --fresh": Scene(f"{TRAIN} --fresh", {**RUN, "run/.git/config": "[a]"}),
    "a run in the home folder, --fresh": Scene(f"{TRAIN} --fresh", {**RUN, "run/.bashrc": "a"}, home="run"),
    "a run behind a link, --fresh": Scene(
        "train --model_name_or_path MODEL --dataset pairs.jsonl --output_dir link --fresh", RUN, soft={"link": "run"}
    ),
    "a lock that is a link": Scene(TRAIN, {"photos.zip": ZIP}, soft={"run/.lock": "../photos.zip"}),
    "a lock of another program": Scene(TRAIN, {"run/.lock": NOTES}),
    "a lock that is a hard link": Scene(TRAIN, {"notes.txt": NOTES}, hard={"run/.lock": "notes.txt"}),
    "a record of a run that is a link": Scene(
        TRAIN, {**RUN, "notes.txt": NOTES}, soft={"run/samples.jsonl": "../notes.txt"}
    ),
    "a file for a run folder": Scene(TRAIN, {"run": NOTES}),
    "data in the run folder, --fresh": Scene(
        "train --model_name_or_path MODEL --dataset run/pairs/train.jsonl --output_dir run --fresh",
        {**RUN, "run/pairs/train.jsonl": PAIR},
    ),
    "labels over their source": Scene(f"{LABEL} pairs.jsonl"),
    "labels over a hard link to their source": Scene(f"{LABEL} out.jsonl", hard={"out.jsonl": "pairs.jsonl"}),
    "labels over a link to their source": Scene(f"{LABEL} out.jsonl", soft={"out.jsonl": "pairs.jsonl"}),
    "labels over notes": Scene(f"{LABEL} out.jsonl", {"out.jsonl": NOTES}),
    "labels beside a record of another program": Scene(f"{LABEL} out.jsonl", {"out.labels.jsonl": "a\nb"}),
    "labels beside a record that is a link": Scene(
        f"{LABEL} out.jsonl", {"notes.txt": NOTES}, soft={"out.labels.jsonl": "notes.txt"}
    ),
    "answers over pairs": Scene(
        "generate --prompts pairs.jsonl --output out.jsonl --model_name_or_path MODEL --use_cpu", {"out.jsonl": PAIR}
    ),
    "answers over their prompts": Scene(
        "generate --prompts pairs.jsonl --output pairs.jsonl --model_name_or_path MODEL --use_cpu"
    ),
    "calls in another program's database": Scene(
        "label judge --candidates pairs.jsonl --output out.jsonl --cache calls.sqlite --endpoint http://127.0.0.1:9/v1"
        " --endpoint_model m --retries 0",
        prepare=_database,
    ),
    "a store exported over itself": Scene("reference export store.sqlite store.sqlite", prepare=_store),
    "a store exported over pairs": Scene("reference export store.sqlite pairs.jsonl", prepare=_store),
    "rows into another program's database": Scene(
        "reference import rows.parquet calls.sqlite", prepare=_export_and_database
    ),
    "pairs converted over pairs": Scene(f"{CONVERT} out.jsonl", {"out.jsonl": PAIR}),
    "pairs converted over themselves": Scene(f"{CONVERT} pairs.jsonl"),
    "pairs converted beside another program's list": Scene(f"{CONVERT} out.jsonl", {"out.jsonl.refused": NOTES}),
    "a mixture over its source": Scene(
        "data mix mix.yaml --output pairs.jsonl", {"mix.yaml": "- {path: pairs.jsonl}\n"}
    ),
    "findings over pairs": Scene("data lint pairs.jsonl --json out.json --lint warn", {"out.json": '{"files": []}'}),
    "numbers over their source": Scene("data inspect pairs.jsonl --json pairs.jsonl"),
    "a picture over a photo": Scene("data inspect pairs.jsonl --png photo.png", {"photo.png": "\x89PNG photo"}),
    "scores over rows": Scene(
        "score --adapter none --model_name_or_path MODEL --dataset pairs.jsonl --output out.jsonl", {"out.jsonl": PAIR}
    ),
    "scores beside another program's summary": Scene(
        "score --adapter none --model_name_or_path MODEL --dataset pairs.jsonl --output out.jsonl",
        {"out.summary.json": '{"mine": 1}'},
    ),
    "a merged model in a folder of photos": Scene(
        "merge --adapter run --output photos", {**RUN, "photos/photos.zip": ZIP}
    ),
    "GGUF beside another Modelfile": Scene("release gguf MODEL --output out.gguf", {"Modelfile": "FROM ./a.gguf\n"}),
    "a verdict over another program's": Scene(
        "release check run", {**RUN, "run/adapter_config.json": "{}", "run/release_check.json": '{"mine": 1}'}
    ),
    "a gate beside another program's gate.json": Scene(
        "eval gate compare", {"compare/summary.json": "{}", "compare/gate.json": '{"mine": 1}'}
    ),
    "a page over notes": Scene("eval report run --output out.html", {**RUN, "out.html": NOTES}),
    "curves over a photo": Scene(
        "eval report run --output out.html --png photos", {**RUN, "photos/loss.png": "\x89PNG photo"}
    ),
}  # fmt: skip


def foreign_rows(bench: Bench) -> list[Row]:
    """Play every scene and compare all that was there before."""
    row = Row(
        "foreign folders and files",
        "A command that meets other people's folders and files refuses with a sentence or writes elsewhere; every byte "
        "of theirs stays.",
    )
    codes = Counter[int]()
    for trial, code, problems in call(play_all, bench.workload, bench.breakage):
        codes[code] += 1
        row.add(problems, trial)
    row.worst = counted(codes.elements())
    return [row]


def play_all(workload: Workload, breakage: str | None) -> list[tuple[str, int, list[str]]]:
    """(scene, exit code, problems) of every scene. Runs in a fork."""
    if breakage:
        BREAKAGES[breakage]()
    return [(name, *play(scene, workload)) for name, scene in SCENES.items()]


def play(scene: Scene, workload: Workload) -> tuple[int, list[str]]:
    """(exit code, problems) of one command, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name, stage(Path(name), scene):
        before, said = contents(), io.StringIO()
        words = scene.command.replace("MODEL", str(workload.model)).split()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = run(words)
        except Exception as error:  # whatever it is, the user sees a traceback
            return 1, [f"{type(error).__name__}: {str(error)[:200]}"]
        after = contents()
        own = {file for file, content in RUN.items() if scene.files.get(file) == content}
        lost = [file for file in before if file not in own and after.get(file) != before[file]]
        problems = [f"{file} is {'changed' if file in after else 'gone'}" for file in lost]
        if code not in (0, *REFUSED):
            problems.append(f"exit code {code}: {last_line(said.getvalue())}")
        return code, problems


def run(words: list[str]) -> int:
    """The exit code of a command of either program."""
    from eval.cli import main as eval_main
    from qlora_dpo.cli import main

    return eval_main(words[1:]) if words[0] == "eval" else main(words)


@contextlib.contextmanager
def stage(folder: Path, scene: Scene) -> Iterator[None]:
    """Be in the folder, with everything of the scene in it."""
    here, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    os.environ["QLORA_DPO_CACHE"] = str(folder / "cache")
    try:
        for file, content in {"pairs.jsonl": PAIR, "rules.yaml": RULES, **scene.files}.items():
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_bytes(content.encode("latin-1"))
        with contextlib.redirect_stdout(io.StringIO()):
            scene.prepare()
        for file, target in scene.soft.items():
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).symlink_to(target)
        for file, target in scene.hard.items():
            Path(file).parent.mkdir(exist_ok=True)
            Path(file).hardlink_to(target)
        if scene.home:
            os.environ["HOME"] = str(folder / scene.home)
        yield
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)


def contents() -> dict[str, str | bytes]:
    """The bytes of every file here, and of every link where it points to."""
    return {
        str(path): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(Path().rglob("*"))
        if path.is_symlink() or path.is_file()
    }
