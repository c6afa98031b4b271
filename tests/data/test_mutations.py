"""Whatever a file holds, loading it gives pairs and listed refusals, or one of the project's own errors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_dpo.data.dataset import load_preference_dataset
from qlora_dpo.data.formats import FORMATS, WRITTEN, all_columns
from qlora_dpo.errors import QloraDpoError

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TEXT = st.text(st.characters(codec=None), max_size=30)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
ANYTHING = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
ROLE = st.sampled_from(["user", "assistant", "system", "tool", None])
SPEAKER = st.sampled_from(["human", "gpt", "system", "observation", None])
CONTENT = st.one_of(TEXT, st.sampled_from(["q", "<|im_end|>", "<|im_start|>system\n"]), ANYTHING)
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": CONTENT})
TURN = st.fixed_dictionaries({"from": SPEAKER, "value": CONTENT})
MESSAGES = st.one_of(MESSAGE, TURN, st.lists(MESSAGE, max_size=4), st.lists(TURN, max_size=4))
TURNS = st.lists(
    st.sampled_from(["\n\nHuman: a", "\n\nAssistant: b", "\n\nAssistant:", "\r\n\r\nHuman: c", "x"]),
    max_size=6,
)
VALUE = st.one_of(ANYTHING, MESSAGES, TURNS.map("".join))
PROMPTS = {
    "plaintext": ("prompt",),
    "opendpo": ("context", "meta", "reference_chosen_log_prob", "reference_rejected_log_prob"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "history", "system"),
}
ROW = st.sampled_from(list(PROMPTS.values())).flatmap(
    lambda keys: st.fixed_dictionaries(
        {}, optional={key: VALUE for key in (*keys, "chosen", "rejected", "category", "confidence", "id")}
    )
)
GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}
GOOD_ROWS = [
    GOOD,
    *(
        {key: value for key, value in all_columns(name).items() if key != dropped}
        for name in WRITTEN
        for dropped in ("", "category")
    ),
]


def check(content: bytes, name: str, tokenizer: Any, **options: Any) -> None:
    """The law: rows in = pairs used + rows reported, or an error that the user can read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            dataset = load_preference_dataset(str(path), tokenizer=tokenizer, cache_dir=folder, **options)
        except QloraDpoError as error:
            assert str(error)
            return
        report = dataset.report
        assert report.rows_read == len(dataset) + len(report.refused)
        assert len(dataset) == report.pairs > 0


@pytest.mark.parametrize("dataset_format", ["auto", *FORMATS])
@given(rows=st.lists(st.one_of(ROW, ANYTHING, st.sampled_from(GOOD_ROWS)), max_size=6), as_array=st.booleans())
@SETTINGS
def test_any_json(chatml: Any, dataset_format: str, rows: list[Any], as_array: bool) -> None:
    text = json.dumps(rows) if as_array else "\n".join(json.dumps(row) for row in rows)
    options = {
        "dataset_format": dataset_format,
        "bad_rows": "skip",
        "max_length": 24,
        "max_prompt_length": 12,
    }
    check(text.encode(), "a.json" if as_array else "a.jsonl", chatml, **options)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
@given(data=st.data())
@SETTINGS
def test_any_mutation_of_a_good_file(chatml: Any, name: str, data: st.DataObject) -> None:
    content = bytearray(_good_file(name))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content)))
        piece = data.draw(
            st.sampled_from([b"", b"\xef\xbb\xbf", b"\r\n", b"NaN", b"null", b'"', b"[", b"{}", b"\xff", b"\0", b","])
        )
        content[place : place + data.draw(st.sampled_from([0, 1, 5, 10_000]))] = piece
    check(bytes(content), name, chatml, bad_rows=data.draw(st.sampled_from(["fail", "skip"])))


@given(content=st.binary(max_size=200))
@SETTINGS
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz"])
def test_any_bytes(chatml: Any, name: str, content: bytes) -> None:
    check(content, name, chatml, bad_rows="skip")


@given(prompt=TEXT, chosen=TEXT, rejected=TEXT)
@SETTINGS
def test_any_text_comes_through_whole(chatml: Any, prompt: str, chosen: str, rejected: str) -> None:
    content = json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}).encode()
    check(content, "a.jsonl", chatml, bad_rows="skip")


def _good_file(name: str) -> bytes:
    import gzip
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "\n".join([json.dumps(GOOD)] * 4).encode()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([GOOD] * 4), buffer)
    return {
        "a.json": json.dumps([GOOD] * 4).encode(),
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.csv": b"prompt,chosen,rejected\n" + b"q,a,b\n" * 4,
        "a.parquet": buffer.getvalue(),
    }[name]
