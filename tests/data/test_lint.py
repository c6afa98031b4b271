"""`data lint`: each rule finds its fault, alone among a thousand rows; good rows pass; errors block, in train too."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_dpo.cli import main
from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.dataset import PairDataset, load_preference_dataset
from qlora_dpo.data.files.sources import open_source
from qlora_dpo.data.formats import ColumnNames
from qlora_dpo.data.linting.duplicates import SIMILAR, TOKENS, Signer, earliest_similar
from qlora_dpo.data.linting.lint import lint_pairs, text_source, tokenized_source
from qlora_dpo.data.linting.report import RULES, LintReport
from qlora_dpo.data.linting.sets import length_bias
from qlora_dpo.data.linting.tokens import BATCH_RULES, SAMPLE_RULES, facts_of
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import PreferencePair, RefusedRow
from qlora_dpo.data.ragged import Ragged
from qlora_dpo.errors import DataError
from qlora_dpo.training import linting
from qlora_dpo.training.data import load_training_data
from qlora_dpo.training.linting import lint_training_data

WORDS = ["amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "jetty", "kelp", "lagoon"]


def text(seed: object, words: int) -> str:
    return " ".join(random.Random(repr(seed)).choices(WORDS, k=words))


def row(number: object, words: int = 12) -> dict[str, Any]:
    answers = (text(("first", number), words), text(("second", number), words))
    return {"prompt": f"Tell me of {text(('prompt', number), words)}", "chosen": answers[0], "rejected": answers[1]}


def good_rows(count: int) -> list[Any]:
    return [row(number) if number >= 10 else row(number, 60) for number in range(count)]


def other_end(given: dict[str, Any]) -> dict[str, Any]:
    return {key: f"{value} pebble" for key, value in given.items()}


def lint_texts(path: str, held_out: str | None = None) -> LintReport:
    files = [path, *([held_out] if held_out else [])]
    sources = [text_source(PairReader(open_source(file), "auto", ColumnNames())) for file in files]
    return lint_all(sources, None)


def lint_tokens(tokenizer: Any, path: str, held_out: str | None = None) -> LintReport:
    files = [path, *([held_out] if held_out else [])]
    datasets = [load_preference_dataset(file, tokenizer=tokenizer, bad_rows="skip") for file in files]
    return lint_all([tokenized_source(dataset) for dataset in datasets], facts_of(tokenizer, 1024, 512))


def lint_all(sources: list[Any], facts: Any) -> LintReport:
    first = len(sources[0].origins)
    places = range(sum(len(source.origins) for source in sources))
    return lint_pairs(sources, train=places[:first], held_out=places[first:], facts=facts)


def found(report: LintReport, rule: str) -> list[str]:
    return [finding.origin.rpartition(":")[2] for finding in report.rows.get(rule, [])]


TENTH = row(9, 60)
# The row at line 500, and the rules that must find it and nothing else.
FAULTS: dict[str, tuple[Any, set[str]]] = {
    "broken JSON": ('{"prompt": "a", ', {"bad_row"}),
    "no answer": (row("a") | {"chosen": " \n"}, {"missing_answer"}),
    "an answer of null": (row("a") | {"rejected": None}, {"missing_answer"}),
    "an invisible answer": (row("a") | {"rejected": "\u200b\u2060 \ufeff"}, {"empty_answer"}),
    "equal answers": (row("a") | {"rejected": row("a")["chosen"]}, {"equal_pair"}),
    "white space": (row("a") | {"rejected": row("a")["chosen"].replace(" ", "\n", 1)}, {"equal_but_for_space"}),
    "an end token as text": (row("a") | {"chosen": "Yes, it is.<|im_end|>"}, {"template_residue"}),
    "the next turn": (row("a") | {"chosen": "Yes, it is.\n\nHuman: And now?"}, {"template_residue"}),
    "a run-on rejected answer": (row("a") | {"rejected": "Yes.\n\nHuman: And now?"}, {"control_text"}),
    "a control token in a prompt": (row("a") | {"prompt": "What does <|im_start|> mean?"}, {"control_text"}),
    "labels the other way round": (
        TENTH | {"chosen": TENTH["rejected"], "rejected": TENTH["chosen"]},
        {"contradictory", "near_duplicate"},
    ),
    "the same pair": (TENTH, {"duplicate"}),
    "nearly the same pair": (other_end(TENTH), {"near_duplicate"}),
    "another prompt, the same answers": (TENTH | {"prompt": row("a")["prompt"]}, set()),
    "the same prompt, other answers": (row("a") | {"prompt": TENTH["prompt"]}, set()),
}  # fmt: skip


COMPARED = ("labels the other way round", "the same pair", "nearly the same pair", "an invisible answer")


@pytest.mark.parametrize(
    ("fault", "mode"), [*((fault, "text") for fault in FAULTS), *((fault, "tokens") for fault in COMPARED)]
)
def test_one_fault_in_a_thousand_rows_is_named(
    fault: str, mode: str, write_jsonl: Callable[..., str], chatml: Any
) -> None:
    bad, rules = FAULTS[fault]
    rows = good_rows(1000)
    rows[499] = bad
    path = write_jsonl(rows)
    report = lint_texts(path) if mode == "text" else lint_tokens(chatml, path)
    assert {name: found(report, name) for name in report.counts} == {name: ["500"] for name in rules}
    assert str(report.rows[next(iter(rules))][0]).startswith(f"{path}:500: ") if rules else report.lines(5)


def test_few_errors_of_a_kind_that_public_data_have_do_not_block(write_jsonl: Callable[..., str]) -> None:
    swapped = {"prompt": TENTH["prompt"], "chosen": TENTH["rejected"], "rejected": TENTH["chosen"]}
    few, many = lint_texts(write_jsonl([*good_rows(300), swapped])), lint_texts(write_jsonl([*good_rows(50), swapped]))
    assert few.counts["contradictory"] == many.counts["contradictory"] == 1
    assert (few.blocking(), many.blocking()) == ([], ["contradictory"])
    assert "contradictory blocks only above 1% of the pairs." in few.lines(5)


def dialogue(answer: str) -> list[dict[str, str]]:
    turns = ("Write a question.", "What is 2 + 3?", "And the answer?", answer)
    return [{"role": ("user", "assistant")[place % 2], "content": said} for place, said in enumerate(turns)]


def test_good_pairs_pass_with_every_kind_of_tokenizer(tokenizer: Any, write_jsonl: Callable[..., str]) -> None:
    report = lint_tokens(tokenizer, write_jsonl([{"chosen": dialogue("5"), "rejected": dialogue("6 é")}]))
    assert not report.counts, report.lines(5)
    plain = {"prompt": "Hello there, what is the answer?", "chosen": "The answer is helpful.", "rejected": "No answer."}
    assert not lint_tokens(tokenizer, write_jsonl([plain], "plain.jsonl")).counts


def batch_of(*rows: tuple[list[int], list[int], list[int]]) -> tuple[Ragged, Ragged, Ragged]:
    columns = zip(*rows, strict=True)
    prompt, chosen, rejected = (Ragged.of(np.array(ids, np.int32) for ids in column) for column in columns)
    return prompt, chosen, rejected


def broken_ids(bos: int, end: int) -> dict[str, tuple[tuple[list[int], list[int], list[int]], list[str]]]:
    good = [20, 21, end]
    return {
        "good": (([bos, 5, 6], good, [22, end]), []),
        "no BOS": (([5, 6], good, [22, end]), ["bos"]),
        "BOS twice": (([bos, bos, 5], good, [22, end]), ["bos"]),
        "BOS in an answer": (([bos, 5], [20, bos, end], [22, end]), ["bos"]),
        "no end": (([bos, 5], [20, 21], [22, end]), ["end_token"]),
        "the end twice": (([bos, 5], [20, end, end], [22, end]), ["end_token"]),
        "cut": (([bos, 5], [20] * 8, [22, end]), []),
        "an empty answer": (([bos, 5], good, []), ["end_token"]),
    }


@pytest.mark.parametrize("case", broken_ids(0, 0))
def test_broken_ids_are_found(case: str, tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("llama3")
    facts = facts_of(tokenizer, 10, 5)
    rows, rules = broken_ids(tokenizer.bos_token_id, facts.end_id)[case]
    batch = batch_of(([facts.bos_id or 0, 9], [30, facts.end_id], [31, facts.end_id]), rows)
    assert [(rule.name, place) for rule in BATCH_RULES for place, _ in rule.check(batch, facts)] == [
        (rule, 1) for rule in rules
    ]


def test_ids_of_another_text_are_found(chatml: Any, write_jsonl: Callable[..., str]) -> None:
    dataset = load_preference_dataset(write_jsonl(good_rows(3)), tokenizer=chatml)
    texts = [pair for pair in dataset.texts if isinstance(pair, PreferencePair)]
    facts = facts_of(chatml, 1024, 512)
    boundary, round_trip = SAMPLE_RULES
    assert not list(boundary.check(texts, dataset[:], facts)) + list(round_trip.check(texts, dataset[:], facts))
    texts[1] = replace(texts[1], prompt="Another question?")
    texts[2] = replace(texts[2], rejected="Another answer.")
    assert [place for place, _ in boundary.check(texts, dataset[:], facts)] == [1, 2]
    ((place, detail),) = round_trip.check(texts, dataset[:], facts)
    assert place == 2
    assert detail.startswith("rejected becomes another text: 'Another answ' becomes ")


def test_characters_without_tokens_are_found(write_jsonl: Callable[..., str]) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "w7", "chosen": f"w8 {word}", "rejected": "w10"} for word in ("w9", "new")]
    report = lint_tokens(tokenizer, write_jsonl(rows))
    assert found(report, "unknown_token") == found(report, "round_trip") == ["2"]
    assert not report.blocking()


def test_what_is_on_both_sides_is_found(write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = good_rows(100)
    held_out = [
        rows[3],
        row("new") | {"prompt": rows[5]["prompt"]},
        row("new") | {"prompt": other_end(rows[7])["prompt"]},
        row("other"),
        row("new") | {"prompt": rows[8]["prompt"], "rejected": rows[8]["chosen"]},
    ]
    files = write_jsonl(rows), write_jsonl(held_out, "held_out.jsonl")
    for report in (lint_texts(*files), lint_tokens(chatml, *files)):
        assert found(report, "leaked_answer") == ["1", "5"]
        assert found(report, "leaked_prompt") == ["2"]
        assert found(report, "nearly_leaked_prompt") == ["3"]
        assert report.blocking() == ["leaked_answer"]
        assert report.held_out == 5


def test_places_that_are_not_used_are_not_looked_at(write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = [*good_rows(2500), TENTH, row("a") | {"chosen": "Yes.<|im_end|>"}]
    dataset = load_preference_dataset(write_jsonl(rows), tokenizer=chatml)
    facts = facts_of(chatml, 1024, 512)
    report = lint_pairs([tokenized_source(dataset)], train=range(9), held_out=[2500], facts=facts)
    assert not report.counts, report.lines(5)
    report = lint_pairs([tokenized_source(dataset)], train=[9, 2501], held_out=[2500], facts=facts)
    assert (found(report, "leaked_answer"), found(report, "template_residue")) == (["2501"], ["2502"])


def test_a_file_that_changes_meanwhile_is_noticed(write_jsonl: Callable[..., str], chatml: Any) -> None:
    path = write_jsonl(good_rows(5))
    dataset = load_preference_dataset(path, tokenizer=chatml)
    Path(path).write_text("\n" * 3 + Path(path).read_text())
    with pytest.raises(DataError, match="the file changed meanwhile"):
        lint_pairs([tokenized_source(dataset)], facts=facts_of(chatml, 1024, 512))


@pytest.mark.parametrize(("longer", "is_biased"), [(50, False), (60, False), (80, True), (15, True)])
def test_length_bias_is_found(longer: int, is_biased: bool, write_jsonl: Callable[..., str]) -> None:
    rows = [
        row(number) | dict(zip(("chosen", "rejected"), order, strict=True))
        for number in range(100)
        for long, short in [(text(("l", number), 40), text(("s", number), 30))]
        for order in [(long, short) if number < longer else (short, long)]
    ]
    report = lint_texts(write_jsonl(rows))
    assert bool(report.counts["length_bias"]) == is_biased
    assert not report.blocking()


def test_correlation_of_length_and_label_is_pearsons() -> None:
    chosen, rejected = np.array([5, 9, 2, 7]), np.array([3, 4, 6, 7])
    lengths = np.concatenate([chosen - rejected, rejected - chosen])
    labels = np.repeat([1, -1], 4)
    share, correlation = length_bias(chosen, rejected)
    assert share == pytest.approx(2 / 3)
    assert correlation == pytest.approx(np.corrcoef(lengths, labels)[0, 1])


def test_answers_that_are_cut_are_counted(write_jsonl: Callable[..., str], chatml: Any) -> None:
    rows = [row(number, 60) for number in range(20)]
    rows[3] = rows[3] | {"rejected": rows[3]["chosen"] + " but not really"}
    dataset = load_preference_dataset(
        write_jsonl(rows), tokenizer=chatml, max_length=100, max_prompt_length=50, bad_rows="skip"
    )
    report = lint_pairs([tokenized_source(dataset)], facts=facts_of(chatml, 100, 50))
    assert found(report, "equal_after_cut") == ["4"]
    assert "100% of the answers lose their end" in report.rows["many_cut"][0].detail
    assert not report.blocking()


@pytest.mark.parametrize("mode", ["text", "tokens"])
def test_a_common_system_prompt_makes_no_near_duplicates(
    mode: str, write_jsonl: Callable[..., str], chatml: Any
) -> None:
    system = {"role": "system", "content": text("system", 300)}
    rows = [
        {"prompt": [system, {"role": "user", "content": text(number, 20)}], "chosen": f"{number}.", "rejected": "No."}
        for number in range(60)
    ]
    files = write_jsonl(rows[:40]), write_jsonl(rows[40:], "held_out.jsonl")
    report = lint_texts(*files) if mode == "text" else lint_tokens(chatml, *files)
    assert not report.counts["near_duplicate"] + report.counts["nearly_leaked_prompt"], report.lines(5)


def test_near_duplicates_are_those_of_exact_comparison() -> None:
    draw = np.random.default_rng(0)
    rows = [draw.integers(0, 5000, 120) for _ in range(200)]
    for number in range(100):  # 1 to 10 tokens changed
        copy = rows[number].copy()
        copy[draw.choice(120, 1 + number % 10, replace=False)] = draw.integers(0, 5000, 1 + number % 10)
        rows.append(copy)
    signatures = Signer(TOKENS, []).sign(Ragged.of(rows))
    partners = earliest_similar([signatures], np.arange(300))
    runs = [{tuple(ids[place : place + TOKENS.run]) for place in range(120 - TOKENS.run + 1)} for ids in rows]
    exact = np.array([len(runs[n] & runs[n + 200]) / len(runs[n] | runs[n + 200]) for n in range(100)])
    is_found = partners[200:] == np.arange(100)
    assert (partners[:200] == -1).all()
    assert is_found[exact > SIMILAR + 0.1].all()
    assert not is_found[exact < SIMILAR - 0.2].any()
    assert 20 < is_found.sum() < 80


def test_a_report_survives_its_json(write_jsonl: Callable[..., str]) -> None:
    report = lint_texts(write_jsonl([*good_rows(20), TENTH, row("a") | {"chosen": "x</s>"}, "{"]))
    again = LintReport.from_json(json.loads(json.dumps(report.as_json())))
    assert again == report
    assert again.blocking() == ["bad_row", "template_residue"]


def test_every_rule_says_what_it_looks_at_and_what_to_do() -> None:
    assert all(rule.looks_at and rule.advice and rule.name == name for name, rule in RULES.items())
    assert all(rule.severity == "error" or not rule.tolerated for rule in RULES.values())


def test_the_command_blocks_warns_and_writes(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = write_jsonl([*good_rows(5), row("a") | {"chosen": "\u200b"}]), tmp_path / "lint.json"
    assert main(["data", "lint", file, "--json", str(output)]) == 65
    printed = capsys.readouterr()
    assert f"{file}:6: empty_answer: chosen holds nothing that can be seen" in printed.out
    assert "no tokenizer was named" in printed.out
    assert f"{file}:6: empty_answer" in printed.err
    written = json.loads(output.read_text())
    assert written["blocking"] == ["empty_answer"]
    assert written["rules"]["empty_answer"]["rows"][0]["origin"] == f"{file}:6"
    assert main(["data", "lint", file, "--lint", "warn"]) == 0
    assert main(["data", "lint", write_jsonl(good_rows(5))]) == 0
    assert "nothing was found" in capsys.readouterr().out


def test_the_command_counts_rows_that_training_would_skip(
    write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl([*good_rows(5), "{"])
    assert main(["data", "lint", file]) == 65
    assert main(["data", "lint", file, "--bad_rows", "skip"]) == 0
    assert f"{file}:6: skipped_row: json: broken JSON" in capsys.readouterr().out


def test_the_command_refuses_what_it_would_ignore(
    write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(good_rows(2))
    assert main(["data", "lint", file, "--preview", "1"]) == 2
    assert main(["data", "lint", file, "--max_length", "64"]) == 2
    assert "--max_length 64 would be ignored: no tokenizer is named" in capsys.readouterr().err


def test_the_command_shows_tokens(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads(pairs_file.read_text().splitlines()[0])
    assert main(["data", "lint", str(pairs_file), "--model_name_or_path", str(model_folder), "--preview", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{pairs_file}:1"
    assert lines[4] == "    " + "|".join([*first["chosen"].split(), "</s> <- end"])
    assert lines[7] == f"{pairs_file}:2"


def loaded(tokenizer: Any, path: str, **options: Any) -> tuple[DataOptions, Any]:
    data_options = DataOptions(dataset=path, **options)
    return data_options, load_training_data(data_options, tokenizer, seed=0)


def test_training_blocks_warns_or_does_not_look(
    write_jsonl: Callable[..., str], chatml: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*good_rows(40), *(row(n) | {"chosen": f"Yes {n}.<|im_end|>"} for n in "abc")]
    path = write_jsonl(rows)
    options, data = loaded(chatml, path, eval_fraction=0.0)
    with pytest.raises(DataError, match=rf"{path}:41: template_residue: .* \(1 of 3 rows\)"):
        lint_training_data(options, data, chatml)
    capsys.readouterr()
    lint_training_data(replace(options, lint="warn"), data, chatml)
    assert f"{path}:43: template_residue" in capsys.readouterr().err
    lint_training_data(replace(options, lint="off"), data, chatml)
    assert capsys.readouterr().err == ""


def test_training_looks_once_at_the_same_pairs(
    write_jsonl: Callable[..., str], chatml: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = linting.lint_pairs
    monkeypatch.setattr(linting, "lint_pairs", lambda *args, **named: calls.append(1) or real(*args, **named))
    path = write_jsonl([*good_rows(40), TENTH])
    for fraction, expected in ((0.2, 1), (0.2, 1), (0.4, 2)):
        options, data = loaded(chatml, path, eval_fraction=fraction)
        lint_training_data(options, data, chatml)
        assert len(calls) == expected
    dataset = data.sources[0]
    assert isinstance(dataset, PairDataset)
    for kept in dataset.folder.glob("lint-*.json"):
        kept.write_text("{")
    lint_training_data(options, data, chatml)
    assert len(calls) == 3


def test_train_stops_at_errors_before_it_loads_a_model(
    model_folder: Path, tmp_path: Path, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [{"prompt": f"w{n} w{n + 1}", "chosen": f"w{n + 2} w9", "rejected": f"w{n} w8"} for n in range(10, 60)]
    swapped = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    path = write_jsonl([*pairs, *swapped])
    command = ["train", "--model_name_or_path", str(model_folder), "--dataset", path, "--eval_fraction", "0"]
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 65
    error = capsys.readouterr().err
    assert f"{path}:51: contradictory: the same prompt and answers as {path}:1" in error
    assert "--lint warn" in error


@pytest.mark.parametrize("name", ["belle_pairs_hh.jsonl", "hh_rlhf_harmless_600.jsonl"])
def test_real_pairs_are_not_blocked(name: str, shared_data: Path, tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("llama_hh")
    dataset = load_preference_dataset(str(shared_data / name), tokenizer=tokenizer, bad_rows="skip")
    report = lint_pairs([tokenized_source(dataset)], facts=facts_of(tokenizer, 1024, 512), bad_rows="known")
    assert report.blocking() == [], report.lines(0)
    assert {"bos", "end_token", "boundary", "round_trip", "unknown_token"}.isdisjoint(report.counts)


def test_refused_rows_keep_their_reasons(write_jsonl: Callable[..., str]) -> None:
    source = text_source(PairReader(open_source(write_jsonl([*good_rows(2), "[]"])), "auto", ColumnNames()))
    assert [type(refused) for refused in source.refused] == [RefusedRow]
    assert lint_pairs([source]).rows["bad_row"][0].detail == "json: a row must be an object (it is list)"


def test_training_on_a_mixture_looks_at_what_is_taken_of_each_source(
    write_jsonl: Callable[..., str], tmp_path: Path, chatml: Any
) -> None:
    residue = row("a") | {"chosen": "Yes.<|im_end|>"}
    write_jsonl(good_rows(20), "good.jsonl")
    bad = write_jsonl([row("b"), residue], "bad.jsonl")
    write_jsonl([row("c") | {"chosen": "\u200b"}, *good_rows(3)], "left_out.jsonl")
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        "sources: [{path: good.jsonl}, {path: bad.jsonl, sample_rate: 2}, {path: left_out.jsonl, sample_rate: 0}]"
    )
    options, data = loaded(chatml, str(mixture), eval_fraction=0.0)
    with pytest.raises(DataError) as refused:
        lint_training_data(options, data, chatml)
    assert f"{bad}:2: template_residue" in str(refused.value)
    assert "left_out" not in str(refused.value)


def test_the_command_reads_every_source_of_a_mixture(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write_jsonl(good_rows(5), "good.jsonl")
    other = write_jsonl([{"question": "b", "chosen": "\u200b", "rejected": "no"}, good_rows(1)[0]], "other.jsonl")
    mixture = tmp_path / "mix.yaml"
    mixture.write_text("sources: [{path: good.jsonl}, {path: other.jsonl, prompt_key: question}]")
    output = tmp_path / "lint.json"
    assert main(["data", "lint", str(mixture), "--json", str(output)]) == 65
    assert f"{other}:1: empty_answer" in capsys.readouterr().out
    assert json.loads(output.read_text())["files"] == [good, other]
    assert main(["data", "lint", str(mixture), "--prompt_key", "question"]) == 2
    assert "--prompt_key would be ignored" in capsys.readouterr().err
    assert main(["data", "inspect", str(mixture)]) == 2
    assert "inspect its sources one by one" in capsys.readouterr().err
