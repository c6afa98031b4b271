"""Data sets on the Hub and on ModelScope, read from a server on this machine: rows, or one clear sentence, soon."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer, rows_of

from qlora_dpo.data.files.sources import open_source, with_config
from qlora_dpo.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
HAS_MODELSCOPE = importlib.util.find_spec("modelscope_hub") is not None
NEEDS_MODELSCOPE = pytest.mark.skipif(not HAS_MODELSCOPE, reason="the package modelscope-hub is not installed")

# The endpoints are read on import, so all is asked for in a process of its own.
ASK = """
import json, sys, time
from qlora_dpo.data.files.sources import open_source, read_rows
from qlora_dpo.errors import QloraDpoError
for source, revision in json.load(sys.stdin):
    source, _, split = source.partition(" ")
    started, rows, error = time.monotonic(), [], None
    try:
        rows = [row.values for row in read_rows(source, split=split or None, revision=revision)]
    except QloraDpoError as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.monotonic() - started
    fingerprint = open_source(source).fingerprint() if rows and "configs" in source and not split else None
    print("ANSWER", json.dumps([rows, error, seconds, fingerprint]))
"""


@dataclass
class Answer:
    rows: list[dict[str, str]]
    error: str | None
    seconds: float
    fingerprint: str | None


Question = tuple[str, str | None]
"""A source, with the split behind a space where one is asked for, and a revision."""


def ask_all(address: str, home: Path, questions: list[Question]) -> dict[Question, Answer]:
    """Read each (source, revision) through a server, one after the other."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}
    environment |= {
        "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1",
        "MODELSCOPE_ENDPOINT": address, "MODELSCOPE_CACHE": str(home / "ms"), "MODELSCOPE_HOME": str(home / "ms"),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(questions), env=environment, cwd=home, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # Whatever the libraries wanted to say as well, the user has heard one sentence.
    assert "Error" not in result.stderr and "Retry" not in result.stderr, result.stderr
    lines = [line.removeprefix("ANSWER ") for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
    return dict(zip(questions, (Answer(*json.loads(line)) for line in lines), strict=True))


HUB = ("org/gated", "org/private", "org/none", "org/breaks", "org/resumes", "org/failing")
CONFIGS = (
    "org/configs",
    "org/configs:first",
    "org/configs:first test",
    "org/configs:second",
    "org/configs:third",
    "org/configs:first nosuch",
    "org/good nosuch",
)
QUESTIONS: list[Question] = [
    ("org/good", "v1"),
    ("org/good", "b" * 40),
    ("org/good", "v9"),
    ("org/good", None),
    *((name, None) for name in HUB),
    *((name, None) for name in CONFIGS),
]
MODELSCOPE_QUESTIONS: list[Question] = [
    ("modelscope:org/good", None),
    ("modelscope:org/good@v1", None),
    ("modelscope:org/good", "v1"),
    ("modelscope:org/good@v9", None),
    ("modelscope:org/none", None),
    ("modelscope:org/private", None),
    ("modelscope:org/breaks", None),
    ("modelscope:org/failing", None),
]


UNANSWERED: list[Question] = [("org/good", None), ("org/good", "v1"), ("org/none", None), ("modelscope:org/none", None)]
Answers = dict[Question, Answer]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, Answers]:
    """The answers while there is a server, and those after it was gone."""
    home = tmp_path_factory.mktemp("home")
    with HubServer() as server:
        answers = ask_all(server.address, home, QUESTIONS + (MODELSCOPE_QUESTIONS if HAS_MODELSCOPE else []))
    return answers, ask_all(server.address, home, UNANSWERED if HAS_MODELSCOPE else UNANSWERED[:-1])


@pytest.fixture
def answers(both: tuple[Answers, Answers]) -> Answers:
    return both[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "revision", "served"),
    [
        ("org/good", None, "main"),
        ("org/good", "v1", "v1"),
        ("org/good", "b" * 40, "v1"),
        ("org/resumes", None, "main"),
        ("org/configs:first", None, "main"),
        ("org/configs:first test", None, "main"),
        ("org/configs:second", None, "main"),
        pytest.param("modelscope:org/good", None, "main", marks=NEEDS_MODELSCOPE),
        pytest.param("modelscope:org/good@v1", None, "v1", marks=NEEDS_MODELSCOPE),
        pytest.param("modelscope:org/good", "v1", "v1", marks=NEEDS_MODELSCOPE),
    ],
)
def test_a_data_set_is_read_at_its_revision(answers: Answers, source: str, revision: str | None, served: str) -> None:
    answer = answers[source, revision]
    assert (answer.rows, answer.error) == (rows_of(served), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("org/gated", None, ["the data set is gated", "accept its terms", "HF_TOKEN"]),
        ("org/private", None, ["or it is private", "HF_TOKEN"]),
        ("org/none", None, ["there is no data set of that name", "spelling"]),
        ("org/good", "v9", ["has no revision 'v9'"]),
        ("org/breaks", None, ["the connection failed", "run the same command again"]),
        ("org/failing", None, ["the connection failed", "503"]),
        *(
            pytest.param(source, None, words, marks=NEEDS_MODELSCOPE)
            for source, words in [
                ("modelscope:org/good@v9", ["revision 'v9'", "spelling"]),
                ("modelscope:org/none", ["there is no data set of that name", "spelling"]),
                ("modelscope:org/private", ["access is denied", "MODELSCOPE_API_TOKEN"]),
                ("modelscope:org/breaks", ["the connection failed", "run the same command again"]),
                ("modelscope:org/failing", ["the connection failed"]),
            ]
        ),
    ],
)
def test_a_fault_is_one_sentence_soon(answers: Answers, source: str, revision: str | None, words: list[str]) -> None:
    answer = answers[source, revision]
    assert answer.rows == [] and answer.error is not None
    assert answer.error.startswith("StorageError: ") and source in answer.error and "\n" not in answer.error
    for word in words:
        assert word in answer.error
    assert answer.seconds < 12


@pytest.mark.slow
def test_without_a_server_the_cache_answers_and_else_one_sentence(both: tuple[Answers, Answers]) -> None:
    answers = both[1]
    assert (answers["org/good", None].rows, answers["org/good", None].error) == (rows_of("main"), None)
    other = answers["org/good", "v1"]
    assert other.rows == [] and f"is not revision v1 but commit {'a' * 40}" in str(other.error)
    for source, answer in ((source, answer) for (source, _), answer in answers.items() if source != "org/good"):
        assert answer.error is not None and "the connection failed" in answer.error and source in answer.error
        assert answer.seconds < 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "org/configs",
            "has several configs, first, second; name one with --dataset_config, or as org/configs:CONFIG.",
        ),
        ("org/configs:third", "has no config 'third'; there is first, second."),
        ("org/configs:first nosuch", "has no split 'nosuch'; there is train, test. Name one with --split"),
        ("org/good nosuch", "has no split 'nosuch'; there is train. Name one with --split"),
    ],
)
def test_what_a_data_set_does_not_have_is_told_by_what_it_has(answers: Answers, source: str, sentence: str) -> None:
    answer = answers[source, None]
    assert answer.rows == [] and answer.error is not None
    assert answer.error.startswith("UsageError: ") and sentence in answer.error


@pytest.mark.slow
def test_configs_of_a_data_set_are_different_sources(answers: Answers) -> None:
    first, second = (answers[f"org/configs:{name}", None].fingerprint for name in ("first", "second"))
    assert first and second and first != second


def test_a_config_is_of_the_hub_and_named_once(tmp_path: Path) -> None:
    assert with_config("owner/name", "x") == "owner/name:x" and with_config("owner/name:y", None) == "owner/name:y"
    for source in (str(tmp_path), "modelscope:org/good"):
        with pytest.raises(UsageError, match="--dataset_config x has no meaning"):
            with_config(source, "x")
    with pytest.raises(UsageError, match="leave one of them out"):
        with_config("owner/name:y", "x")


def test_modelscope_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(UsageError, match=r"pip install modelscope-hub"):
        open_source("modelscope:org/good")


@pytest.mark.parametrize("name", ["modelscope:good", "modelscope:", "modelscope:a/b/c", "modelscope:org/"])
def test_a_name_that_modelscope_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="ORG/NAME"):
        open_source(name)


def test_a_revision_is_named_once() -> None:
    with pytest.raises(UsageError, match="leave one of them out"):
        open_source("modelscope:org/good@v1", revision="v2")
