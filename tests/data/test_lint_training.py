"""The lint of `train`: it blocks, warns or does not look, and looks once at the same pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lint_rows import TENTH, good_rows, row

from qlora_dpo.cli import main
from qlora_dpo.config.training import DataOptions
from qlora_dpo.data.dataset import PairDataset
from qlora_dpo.errors import DataError
from qlora_dpo.training import linting
from qlora_dpo.training.data import load_training_data
from qlora_dpo.training.linting import lint_training_data


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
