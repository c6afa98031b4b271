"""Log-probs that data rows bring along: carried to the trainer unharmed, used if they are its own, else refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import random_pairs, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.data.dataset import PairDataset, load_preference_dataset
from qlora_dpo.data.packing import pack
from qlora_dpo.errors import ModelError
from qlora_dpo.reference.local import ReferenceLogps
from qlora_dpo.reference.row_logps import RowReference, check_row_sums, spread
from qlora_dpo.reference.store import ReferenceStore, completion_key
from qlora_dpo.training.records.tracking import read_metrics

STEPS = ("--max_steps", "3", "--gradient_accumulation_steps", "4", "--learning_rate", "1e-2", "--eval_fraction", "0.1")


def opendpo(row: dict[str, str], logps: Sequence[float] | None) -> dict[str, Any]:
    given = {} if logps is None else {"reference_chosen_log_prob": logps[0], "reference_rejected_log_prob": logps[1]}
    return {
        "context": [{"role": "user", "content": row["prompt"]}],
        "chosen": {"role": "assistant", "content": row["chosen"]},
        "rejected": {"role": "assistant", "content": row["rejected"]},
    } | given


def written(file: Path, rows: Sequence[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def sums(model_folder: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """What the tiny model, in 4 bit, gives both answers of every pair."""
    store = tmp_path_factory.mktemp("sums") / "store.sqlite"
    assert main(["reference", *data(model_folder, pairs_file), "--store", str(store)]) == 0
    pairs = load_preference_dataset(str(pairs_file), tokenizer=tiny_tokenizer())
    with ReferenceStore.open(store, read_only=True) as opened:
        rows = opened.of(opened.models()[0].identity)
        keys = [
            [completion_key(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)] for pair in pairs
        ]
        return [[float(rows.get(both)[key].sum(dtype=np.float64)) for key in both] for both in keys]


def data(model: Path, file: Path | str) -> list[str]:
    return [
        "--model_name_or_path",
        str(model),
        "--dataset",
        str(file),
        "--use_cpu",
        "--dtype",
        "float32",
        "--lint",
        "off",
    ]


def train(model: Path, file: Path | str, output: Path, *more: str) -> int:
    return main(["train", *data(model, file), "--output_dir", str(output), *STEPS, "--lora_r", "4", *more])


def load(file: str, **options: Any) -> PairDataset:
    return load_preference_dataset(file, tokenizer=tiny_tokenizer(), **options)


def test_tokenization_carries_them(pairs_file: Path, tmp_path: Path) -> None:
    texts = rows_of(pairs_file)[:5]
    logps: list[tuple[float, float] | None] = [(-1.5, -2.25), None, (0.0, -1e-9), (-517.12, -509.63), None]
    file = written(tmp_path / "rows.jsonl", [opendpo(*both) for both in zip(texts, logps, strict=True)])
    for is_cached in (False, True):
        pairs = load(file)
        assert pairs.report.from_cache is is_cached and pairs.report.reference_logps == 3
        found = [(pair.reference_chosen_logp, pair.reference_rejected_logp) for pair in pairs]
        assert found == [both or (None, None) for both in logps]
        expected = np.array([both or (np.nan, np.nan) for both in logps])
        assert np.array_equal(pairs.reference_sums(), expected, equal_nan=True)


def test_other_numbers_are_other_data(pairs_file: Path, tmp_path: Path) -> None:
    texts = rows_of(pairs_file)[:2]
    prints = {
        load(written(tmp_path / f"{number}.jsonl", [opendpo(text, logps) for text in texts])).fingerprint
        for number, logps in enumerate([None, (-1.0, -2.0), (-1.0, -2.5)])
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    "limits", [{"max_length": 12, "max_prompt_length": 8}, {"max_length": 40, "max_prompt_length": 4}]
)
def test_a_truncated_pair_loses_them_and_that_is_counted(
    limits: dict[str, int], pairs_file: Path, tmp_path: Path
) -> None:
    file = written(tmp_path / "rows.jsonl", [opendpo(text, (-1.0, -2.0)) for text in rows_of(pairs_file)])
    whole, cut = load(file), load(file, **limits)
    kept = 0
    before = {pair.origin: pair for pair in whole}
    for pair in cut:
        same = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        is_whole = same == (
            before[pair.origin].prompt_ids,
            before[pair.origin].chosen_ids,
            before[pair.origin].rejected_ids,
        )
        assert (pair.reference_chosen_logp is not None) == is_whole
        kept += is_whole
    assert cut.report.reference_logps == kept and cut.report.dropped_reference_logps == len(cut) - kept
    assert 0 < kept < len(cut)
    assert any(line.startswith("reference log-probs: ") for line in cut.report.summary())


@pytest.mark.parametrize(("total", "length"), [(-509.63, 500), (-1.0, 3), (0.0, 4), (-7.3, 1), (-12345.678, 1000)])
def test_a_spread_sum_is_the_sum(total: float, length: int) -> None:
    values = spread(total, length)
    assert len(values) == length and values.dtype == np.float32
    assert abs(float(values.sum(dtype=np.float64)) - total) <= 1e-6 * abs(total)
    assert abs(float(torch.from_numpy(values).sum()) - total) <= 1e-5 * abs(total)


def test_pairs_without_sums_are_scored_and_the_others_are_not() -> None:
    pairs = random_pairs([(3, 4, 2), (5, 1, 3), (2, 2, 6)])
    sums = np.array([[-4.0, -3.0], [np.nan, np.nan], [-1.0, -2.5]])
    scored: list[int] = []

    def score(batch: Any) -> torch.Tensor:
        scored.append(len(batch.completion_lengths) // 2)
        return torch.arange(len(batch.target_ids), dtype=torch.float32)

    reference = RowReference(sums, ReferenceLogps(score))
    both = reference([0, 2], pack([pairs[0], pairs[2]], "shared"))
    assert not scored and [part.sum().item() for part in both.split([4, 2, 2, 6])] == [-4.0, -3.0, -1.0, -2.5]
    assert reference.unknown([0, 1, 2]) == [1]
    mixed = reference([2, 1], pack([pairs[2], pairs[1]], "shared"))
    assert scored == [2] and mixed[8:].tolist() == [8.0, 9.0, 10.0, 11.0]
    assert [part.sum().item() for part in mixed[:8].split([2, 6])] == [-1.0, -2.5]
    assert reference.unknown([0, 1, 2]) == []
    assert reference.blank()([0, 2], pack([pairs[0], pairs[2]], "shared"))[0] == 0.0


def our_logps(pairs: int = 8) -> list[Any]:
    draw = np.random.default_rng(0)
    return [-draw.exponential(1.5, size=draw.integers(5, 40)).astype(np.float32) for _ in range(2 * pairs)]


def in_pairs(values: Any) -> Any:
    return np.array(values, np.float64).reshape(-1, 2)


def test_their_own_sums_are_believed_with_their_rounding() -> None:
    ours = our_logps()
    drift = check_row_sums(in_pairs([own.sum(dtype=np.float64) + 0.01 for own in ours]), ours, beta=0.1, max_drift=0.02)
    assert drift.max_per_answer == pytest.approx(0.01, rel=1e-6) and drift.mean_margin < 1e-6
    assert drift.loss == pytest.approx(np.log(2))


@pytest.mark.parametrize(
    ("make", "named"),
    [(lambda own: own.sum() - 0.05 * len(own), r"by 0.0500 per token.*instead of 0.6931.*--max_drift 0.02"),
     (lambda own: np.trunc(own.sum()), "whole numbers.*OpenDPO.*int32"),
     (lambda own: own[:-1].sum() - 1e-3, "seem to be sums without the token that ends the answer"),
     (lambda own: own.mean(), "seem to be means per token"), (lambda own: 2.1 * own.sum(), "of another model")],
)  # fmt: skip
def test_other_numbers_are_refused_and_recognized(make: Any, named: str) -> None:
    ours = our_logps()
    with pytest.raises(ModelError, match=named) as error:
        check_row_sums(in_pairs([make(own) for own in ours]), ours, beta=0.1, max_drift=0.02)
    assert "--row_reference ignore" in str(error.value)


def test_exchanged_answers_are_recognized() -> None:
    ours = our_logps()
    swapped = in_pairs([own.sum() for own in ours])[:, ::-1]
    with pytest.raises(ModelError, match="seem to be those of the other answer"):
        check_row_sums(swapped, ours, beta=0.1, max_drift=0.02)


@pytest.mark.slow
def test_a_run_on_rows_with_its_own_log_probs_is_the_run_that_computes_them(
    model_folder: Path, pairs_file: Path, sums: list[list[float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = rows_of(pairs_file)
    rows = [opendpo(text, None if number % 4 == 3 else logps)
            for number, (text, logps) in enumerate(zip(texts, sums, strict=True))]  # fmt: skip
    file = written(tmp_path / "rows.jsonl", rows)
    for name in ("verify", "ignore"):
        assert train(model_folder, file, tmp_path / name, "--row_reference", name, "--reference_store", "none") == 0
    told = capsys.readouterr().err
    assert "reference: 30 of 40 pairs bring their own log-probs, which are used; the other 10 are computed here" in told
    assert "a sigmoid loss of 0.6931 instead of 0.6931" in told
    used, computed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("verify", "ignore"))
    for one, other in zip(used, computed, strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert one[name] == pytest.approx(other[name], abs=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "named"),
    [(lambda total: float(int(total)), "whole numbers"), (lambda total: 1.3 * total, "another model")],
)
def test_rows_of_another_model_stop_the_run_before_it_begins(
    spoil: Any, named: str, model_folder: Path, pairs_file: Path, sums: list[list[float]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [opendpo(text, [spoil(total) for total in both])
            for text, both in zip(rows_of(pairs_file), sums, strict=True)]  # fmt: skip
    file = written(tmp_path / "rows.jsonl", rows)
    assert train(model_folder, file, tmp_path / "run") == 65
    assert named in (told := capsys.readouterr().err) and "Traceback" not in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(model_folder, file, tmp_path / "run", "--row_reference", "ignore") == 0


def test_a_loss_that_reads_tokens_is_refused(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "rows.jsonl", [opendpo(text, (-1.0, -2.0)) for text in rows_of(pairs_file)])
    assert train(model_folder, file, tmp_path / "run", "--ld_alpha", "0.5") == 2
    assert "--ld_alpha 0.5 weighs" in capsys.readouterr().err
