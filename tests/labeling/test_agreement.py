"""Agreement: kappa and alpha by hand, of annotators, and of two labellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main
from qlora_dpo.labeling.agreement import agreement_of, cohen_kappa, krippendorff_alpha
from qlora_dpo.labeling.candidates import load_candidates
from qlora_dpo.labeling.records import Record, Verdict, finish, record_path


def test_cohen_kappa_of_a_known_table() -> None:
    # 20 both yes, 5 yes/no, 10 no/yes, 15 both no: p_o 0.7, p_e 0.5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(second, first) == pytest.approx(0.4)
    assert cohen_kappa("abc", "abc") == 1
    assert cohen_kappa("ab", "ba") == pytest.approx(-1)
    assert cohen_kappa("aaa", "aaa") is None
    assert cohen_kappa("aaa", "bbb") == 0


def test_krippendorff_alpha_of_a_known_table() -> None:
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C: nominal, four observers, alpha 0.743
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[label for label in unit if label is not None] for unit in zip(*observers, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["a", "a"], ["b", "b", "b"]]) == 1
    assert krippendorff_alpha([["a", "a"], ["a", "a"], ["b"]]) is None
    assert krippendorff_alpha([["a"], ["b"]]) is None


def verdict(key: str, chosen: int | None, annotator: str | None = None) -> Verdict:
    rejected = None if chosen is None else 1 - chosen
    return Verdict(key, chosen, rejected, (), 1.0, "human", "v", "2026-01-01T00:00:00+00:00", annotator)


def test_agreement_of_two_and_of_three_annotators() -> None:
    def of(votes: dict[str, str]) -> Any:
        """Votes by annotator: a letter per set of answers, - where there is none."""
        verdicts = [
            verdict(f"k{place}", None if letter == "t" else int(letter), name)
            for name, letters in votes.items()
            for place, letter in enumerate(letters)
            if letter != "-"
        ]
        return agreement_of({(item.key, item.annotator): item for item in verdicts})

    assert of({"ann": "01t"}) is None
    assert of({"ann": "01-", "ben": "--t"}) is None
    two = of({"ann": "01t-", "ben": "00t1"})
    assert (two.annotators, two.sets, two.equal, two.statistic) == (("ann", "ben"), 3, 2, "Cohen's kappa")
    assert two.value == pytest.approx(0.5)
    assert str(two) == "2 annotators (ann, ben) agree on 2 of 3 sets of answers, Cohen's kappa 0.50"
    three = of({"ann": "01t", "ben": "00t", "cem": "0--"})
    assert (len(three.annotators), three.sets, three.equal) == (3, 3, 2)
    assert three.statistic == "Krippendorff's alpha"
    assert three.value == pytest.approx(krippendorff_alpha(["000", "10", "tt"]))
    assert str(of({"ann": "00", "ben": "00"})).endswith("Cohen's kappa not defined")


@pytest.fixture
def labelled(tmp_path: Path) -> dict[str, Path]:
    """Ten pairs, and two records of them with the pairs that came of it."""
    rows = [
        {"prompt": f"p{n}", "chosen": "good", "rejected": "bad", "category": "ab"[n % 2], "confidence": 0.9}
        for n in range(10)
    ]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    candidates = load_candidates(str(source))
    files = {"source": source}
    for name, letters in {"x": "ggggbbttgg", "y": "gggbbgttt-"}.items():
        output = tmp_path / f"{name}.jsonl"
        record = Record(record_path(output))
        for item, letter in zip(candidates, letters, strict=True):
            choice = {"g": item.answers.index("good"), "b": item.answers.index("bad"), "t": None}
            if letter != "-":
                record.add(verdict(item.key, choice[letter]))
        finish(output, candidates, record.verdicts())
        files |= {name: output, f"{name} record": record.file}
    return files


def compare(capsys: pytest.CaptureFixture[str], *files: Path) -> str:
    assert main(["data", "compare-labels", *map(str, files)]) == 0
    return capsys.readouterr().out


def test_two_records(labelled: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    told = compare(capsys, labelled["x record"], labelled["y record"])
    assert "10 labels, 1 only there" in told and "9 labels, 0 only there" in told
    assert "66.7% equal (6)" in told
    cells = [line.split()[1:] for line in told.splitlines() if line.split()[:1] in (["first"], ["second"], ["tie"])]
    cells = [[int(cell) for cell in row] for row in cells if all(cell.isdigit() for cell in row)]
    assert [sum(column) for column in zip(*cells, strict=True)][2] == 3 and sum(map(sum, cells)) == 9
    assert cells[2] == [0, 0, 2]
    assert "by category" not in told


def test_a_record_with_pairs_and_pairs_with_the_source(
    labelled: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    told = compare(capsys, labelled["x"], labelled["y record"])
    assert "8 labels, 1 only there" in told and "9 labels, 2 only there" in told
    assert "by category:\n  a  " in told
    told = compare(capsys, labelled["x"], labelled["source"])
    assert "75.0% equal (6)" in told and "10 labels, 2 only there" in told
    assert "100.0% equal (10), Cohen's kappa 1.00" in compare(capsys, labelled["source"], labelled["source"])


def test_what_cannot_be_compared(labelled: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    assert main(["data", "compare-labels", str(other), str(labelled["x"])]) == 65
    assert "no answers in common" in capsys.readouterr().err
    other.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n{"prompt": "q", "chosen": "a"}\n')
    assert "1 rows are no pairs: rejected: missing" in compare(capsys, other, other)
    assert main(["data", "compare-labels", str(tmp_path / "no.labels.jsonl"), str(labelled["x"])]) == 74
    assert main(["data", "compare-labels", str(labelled["x"])]) == 2
