"""Real rows, where they are at hand. Their text is never shown: some of it is offensive by design."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.data.control_tokens import control_tokens
from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.errors import DataError


@pytest.mark.parametrize(
    ("name", "rows", "reasons"),
    [
        ("belle_pairs_hh.jsonl", 443, {"rejected: the same answer as chosen": 9}),
        ("hh_rlhf_harmless_600.jsonl", 600, {}),
    ],
)
def test_real_pairs_are_accounted_for(
    shared_data: Path,
    tokenizers: Callable[[str], Any],
    tmp_path: Path,
    name: str,
    rows: int,
    reasons: dict[str, int],
) -> None:
    tokenizer = tokenizers("llama_hh")
    dataset = load_preference_dataset(str(shared_data / name), tokenizer=tokenizer, bad_rows="skip", cache_dir=tmp_path)
    report = dataset.report
    assert report.dataset_format == "hh-rlhf"
    assert rows == report.rows_read == len(dataset) + len(report.refused)
    assert {kind: report.refused_by_reason[kind] for kind in reasons} == reasons
    assert len(report.refused) <= 10
    specials = set(control_tokens(tokenizer))
    for pair in dataset:
        assert pair.prompt_ids[0] == tokenizer.bos_token_id
        assert not specials & set(pair.prompt_ids[1:])
        assert len(pair.prompt_ids) <= 512
        for ids in (pair.chosen_ids, pair.rejected_ids):
            assert not specials & set(ids[:-1])
            whole = len(pair.prompt_ids) + len(ids) < 1024
            assert not whole or ids[-1] == tokenizer.eos_token_id


def test_bad_real_rows_fail_by_default(shared_data: Path, tokenizers: Callable[[str], Any], tmp_path: Path) -> None:
    source = str(shared_data / "belle_pairs_hh.jsonl")
    with pytest.raises(DataError, match="9 of 443 rows"):
        load_preference_dataset(source, tokenizer=tokenizers("llama_hh"), cache_dir=tmp_path)
