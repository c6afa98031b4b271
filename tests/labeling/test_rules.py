"""Labels by rules: each rule's scores, composition, ties, what is refused, a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_dpo.cli import main
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.labeling.records import Candidates, read_candidates
from qlora_dpo.labeling.rule_kinds import KINDS, chrf, token_f1, words
from qlora_dpo.labeling.rules import decide
from qlora_dpo.labeling.rules_file import read_rules


def score(kind: str, answer: str, reference: str | None = None, **options: Any) -> float | None:
    result = KINDS[kind](**options)(Candidates("Wie geht es dir?", (answer,), reference_answer=reference), answer)
    assert result is None or isinstance(result, float)
    return result


def rules_file(folder: Path, content: Any) -> Path:
    file = folder / "rules.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("kind", "answer", "options", "expected"),
    [
        ("length", "abcd", {"min": 4, "max": 4}, 1),
        ("length", "abcd", {"min": 5}, 0),
        ("length", "abcd", {"max": 3}, 0),
        ("length", "abcd", {"target": 8}, 0.5),
        ("length", "abcd" * 4, {"target": 8}, 0.5),
        ("length", "abcd" * 4, {"target": 8, "max": 10}, 0),
        ("length", "one two, three!", {"max": 3, "min": 3, "unit": "words"}, 1),
        ("length", "我爱你 too", {"target": 4, "unit": "words"}, 1),
        ("regex", "Dear Sir,\nyes", {"match": "sir.*YES", "ignore_case": True}, 1),
        ("regex", "Dear Sir,\nyes", {"match": "sir"}, 0),
        ("regex", "Dear Sir", {"forbid": "Sir"}, 0),
        ("regex", "Dear Sir", {"match": "Dear", "forbid": "Madam"}, 1),
        ("json_valid", ' {"a": 1}\n', {}, 1),
        ("json_valid", '{"a": 1}', {"keys": ("a",)}, 1),
        ("json_valid", '{"a": 1}', {"keys": ("a", "b")}, 0),
        ("json_valid", '{"a": 1}', {"type": "array"}, 0),
        ("json_valid", "[1]", {"type": "array"}, 1),
        ("json_valid", "[1]", {"keys": ("a",)}, 0),
        ("json_valid", '```json\n{"a": 1}\n```', {}, 0),
        ("json_valid", "NaN", {}, 0),
        ("json_valid", "[" * 100_000, {}, 0),
        ("refusal", "I’m  sorry, but I can't help.", {}, 1),
        ("refusal", "作为一个人工智能，我没有身体。", {}, 1),
        ("refusal", "Sure. " + "x " * 200 + "I cannot", {}, 0),
        ("refusal", "Nein danke", {"phrases": ("nein",)}, 1),
        ("refusal", "Paris.", {}, 0),
        ("repetition", "a b a b a b", {"n": 2}, 3 / 5),
        ("repetition", "好好好好好", {"n": 2}, 3 / 4),
        ("repetition", "a b c", {"n": 4}, 0),
    ],
)
def test_scores_of_single_rules(kind: str, answer: str, options: dict[str, Any], expected: float) -> None:
    assert score(kind, answer, **options) == pytest.approx(expected)


def test_overlap_with_the_reference_answer() -> None:
    assert score("reference_overlap", "x") is None
    assert score("reference_overlap", "the capital is Paris", "the capital is Paris") == pytest.approx(1)
    assert score("reference_overlap", "法国的首都是巴黎", "首都是巴黎", metric="token_f1") == pytest.approx(10 / 13)
    assert token_f1("a a b", "a c") == pytest.approx(2 / 5)
    assert token_f1("a", "b") == 0
    assert chrf("Paris it is", "It is Paris") > chrf("London", "It is Paris")


def test_languages() -> None:
    german, chinese = "Mir geht es heute sehr gut, vielen Dank.", "我今天很好，谢谢你的关心。"
    assert score("language", german, language="de") == score("language", chinese, language="zh") == 1
    assert score("language", german, language="zh") == 0
    assert score("language", german, language="prompt") == 1  # the prompt is German
    assert score("language", chinese, language="prompt") == 0
    assert score("language", "42", language="en") == 0.5
    item = Candidates(({"role": "user", "content": "42"},), (german,))
    assert KINDS["language"]("prompt")(item, german) is None


def test_words_of_mixed_scripts() -> None:
    assert words("Don't 我爱 state-of-the-art, GPT4!") == ["don't", "我", "爱", "state-of-the-art", "gpt4"]


def test_composition_and_weights(tmp_path: Path) -> None:
    rules, _ = read_rules(
        rules_file(
            tmp_path,
            """
- {rule: length, target: 10, weight: 3}
- not: {rule: refusal}
- all: [{rule: regex, match: a}, {any: [{rule: regex, match: b}, {not: {rule: regex, match: c}}]}]
  weight: 0.5
- rule: reference_overlap
- {rule: length, max: 100}
""",
        )
    )
    assert [rule.name for rule in rules] == [
        "1 (length)", "not refusal", "all regex, any regex, not regex", "reference_overlap", "5 (length)",
    ]  # fmt: skip
    item = Candidates("p", ("aaaaaaaaaa", "I cannot c", "aaaac"))
    verdict = decide(item, rules, 0.05, "v")
    expected = [(3 * 1 + 1 + 0.5 + 1) / 5.5, (3 * 1 + 0 + 0 + 1) / 5.5, (3 * 0.5 + 1 + 0 + 1) / 5.5]
    assert verdict.scores == pytest.approx(expected)
    assert (verdict.chosen, verdict.rejected) == (0, 2)
    assert verdict.confidence == pytest.approx(0.5 + (expected[0] - expected[2]) / 2)
    assert verdict.detail["rules"]["not refusal"] == [1, 0, 1]
    assert verdict.detail["rules"]["reference_overlap"] is None


def test_small_margins_and_silent_rules_tie(tmp_path: Path) -> None:
    length, _ = read_rules(rules_file(tmp_path, [{"rule": "length", "target": 100}]))
    near = Candidates("p", ("a" * 100, "a" * 96))
    assert decide(near, length, 0.05, "v").is_tie
    assert not decide(near, length, 0.03, "v").is_tie
    assert decide(Candidates("p", ("a" * 9, "b" * 9)), length, 0.0, "v").is_tie
    overlap, _ = read_rules(rules_file(tmp_path, [{"not": {"all": [{"rule": "reference_overlap"}]}}]))
    silent = decide(Candidates("p", ("a", "b")), overlap, 0.05, "v")
    assert silent.is_tie and silent.scores == (0.0, 0.0) and silent.confidence == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"rule": "lenght", "max": 3}], ["rule 1", "'lenght' is not a rule", "nearest is length"]),
        ([{"rule": "length", "maximum": 3}], ["rule 1 (length)", "'maximum'", "nearest is max"]),
        ([{"rule": "length", "max": "3"}], ["rule 1 (length): max", "valid integer", "'3'"]),
        ([{"rule": "length"}], ["rule 1 (length)", "needs min, max or target"]),
        ([{"rule": "length", "min": 3, "max": 2}], ["min 3 is above max 2"]),
        ([{"rule": "length", "max": 3, "unit": "word"}], ["unit", "'characters' or 'words'"]),
        ([{"rule": "regex", "match": "("}], ["is no regular expression"]),
        ([{"rule": "language", "language": "English"}], ["neither an ISO 639 code"]),
        ([{"rule": "language"}], ["language: Field required"]),
        ([{"rule": "refusal", "phrases": [1]}], ["phrases", "valid string"]),
        ([{"rule": "refusal"}, {"rule": "refusal", "weight": 0}], ["rule 2", "weight is 0"]),
        ([{"rule": "refusal", "weight": True}], ["weight is True"]),
        ([{"rule": "refusal", "weight": float("nan")}], ["weight is nan"]),
        ([{"rules": "refusal"}], ["names no rule", "nearest is rule"]),
        ([{"al": [{"rule": "refusal"}]}], ["names no rule", "nearest is all"]),
        ([{"all": {"rule": "refusal"}}], ["all must be a list"]),
        ([{"all": [{"rule": "refusal", "weight": 2}]}], ["all[1]", "weight belongs to an entry of the list"]),
        ([{"not": {"rule": "refusal"}, "any": []}], ["any: 'not' is not a key here"]),
        ([{"not": ["x"]}], ["must be a mapping"]),
        (["refusal"], ["must be a mapping"]),
        ({"rule": "refusal"}, ["must be a list of rules"]),
        ("", ["must be a list of rules"]),
        ("- {", ["is no YAML"]),
    ],
)
def test_what_is_wrong_with_a_rules_file_is_named(tmp_path: Path, content: Any, words: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        read_rules(rules_file(tmp_path, content))
    assert all(word in str(error.value) for word in words), error.value


def test_a_missing_rules_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read"):
        read_rules(tmp_path / "none.yaml")


def test_the_command_labels_goes_on_and_starts_over_with_other_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "p0", "answers": ["yes", "I cannot"], "category": "qa", "reference_answer": "yes"},
        {"prompt": "p1", "answers": ["I cannot", "no", "maybe"]},
        {"prompt": "p2", "answers": ["I can't", "I cannot"]},
        {"prompt": "p2", "answers": ["I can't", "I cannot"]},
    ]
    source, output = tmp_path / "c.jsonl", tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = rules_file(tmp_path, [{"not": {"rule": "refusal"}}, {"rule": "reference_overlap"}])
    arguments = ["label", "rules", "--candidates", str(source), "--rules", str(file), "--output", str(output)]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "2 pairs, 2 ties of 4" in told and "qa 1" in told
    assert "rule reference_overlap was left out for 3 of them: they have no reference_answer" in told
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("yes", "I cannot"), ("no", "I cannot")]
    assert pairs[1]["confidence"] == 1 and 0.9 < pairs[0]["confidence"] <= 1
    record = tmp_path / "pairs.labels.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    assert len(lines) == 3

    record.write_text(lines[0] + lines[1][:40])  # as a kill leaves it
    assert main(arguments) == 0
    assert [json.loads(line)["key"] for line in record.read_text().splitlines()] == [
        json.loads(line)["key"] for line in lines
    ]
    assert record.read_text().startswith(lines[0])
    rules_file(tmp_path, [{"rule": "refusal"}])
    assert main(arguments) == 0
    pairs = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("I cannot", "yes"), ("I cannot", "no")]
    assert len(record.read_text().splitlines()) == 6


def test_options_that_cannot_work_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = rules_file(tmp_path, [{"rule": "refusal"}])
    arguments = ["label", "rules", "--candidates", "none.jsonl", "--rules", str(file)]
    assert main([*arguments, "--output", str(tmp_path / "p.jsonl"), "--min_margin", "2"]) == 2
    assert "--min_margin 2.0" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "p.jsonl")]) == 74
    assert "none.jsonl" in capsys.readouterr().err


def test_real_rows(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shared_data / "belle_pairs_hh.jsonl"
    file = rules_file(
        tmp_path,
        [
            {"not": {"rule": "refusal"}},
            {"not": {"rule": "repetition"}},
            {"rule": "length", "target": 120},
        ],
    )
    output = tmp_path / "pairs.jsonl"
    arguments = ["--candidates", str(source), "--rules", str(file), "--output", str(output), "--bad_rows", "skip"]
    assert main(["label", "rules", *arguments]) == 0
    pairs = output.read_text(encoding="utf-8").splitlines()
    assert len(pairs) > 200, capsys.readouterr().out
    assert sum(1 for _ in read_candidates(str(output))) == len(pairs)
