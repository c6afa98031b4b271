"""`reference info`, `export` and `import`: a store goes through Parquet and back, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference.test_store import MODEL, OTHER, assert_whole, row, rows_of

from qlora_dpo.cli import main
from qlora_dpo.reference import commands
from qlora_dpo.reference.store import ReferenceStore


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store.sqlite"
    with ReferenceStore.open(path) as opened:
        opened.of(MODEL).put(rows_of(*range(25)))
        opened.of(OTHER).put(rows_of(*range(5)))
    return path


def reference(command: str, *arguments: object) -> int:
    return main(["reference", command, *map(str, arguments)])


def test_info_lists_the_models(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference("info", store) == 0
    said = capsys.readouterr().out
    assert "0.1 MB, 2 models" in said and MODEL.fingerprint in said
    assert "25 completions with 500 tokens, since 20" in said and "model: two" in said
    assert reference("info", store.with_name("none.sqlite")) == 74
    assert "there is no reference store" in capsys.readouterr().err


def test_store_goes_through_parquet_and_back(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "BATCH", 10)
    file, copy = tmp_path / "out" / "rows.parquet", tmp_path / "copy.sqlite"
    assert reference("export", store, file) == 0
    assert "30 completions of 2 models" in capsys.readouterr().out
    for said in ("30 completions were added, 0 were there already", "0 completions were added, 30 were there already"):
        assert reference("import", file, copy) == 0
        assert said in capsys.readouterr().out
    with ReferenceStore.open(copy) as opened:
        assert_whole(opened.of(MODEL), range(25))
        assert_whole(opened.of(OTHER), range(5))
        assert [model.identity for model in opened.models()] == [MODEL, OTHER]


def test_parts_of_two_machines_are_merged(tmp_path: Path) -> None:
    merged = tmp_path / "merged.sqlite"
    for number in (0, 1):
        path = tmp_path / f"part-{number}.sqlite"
        with ReferenceStore.open(path) as opened:
            opened.of(MODEL).put(rows_of(*range(number, 40, 2)))
        assert reference("export", path, tmp_path / f"{number}.parquet") == 0
        assert reference("import", tmp_path / f"{number}.parquet", merged) == 0
    with ReferenceStore.open(merged) as opened:
        assert_whole(opened.of(MODEL), range(40))
        assert len(opened.of(MODEL)) == 40


def test_other_values_are_counted_and_those_that_are_there_stay(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "rows.parquet", tmp_path / "other.sqlite"
    assert reference("export", store, file) == 0
    with ReferenceStore.open(other) as opened:
        (key, values), (shorter, _) = row(3), row(4)
        close, far = values - np.float32(5e-4), values - np.float32(0.25)
        opened.of(MODEL).put({key: far, shorter: values[:3], row(5)[0]: row(5)[1] - np.float32(5e-4)})
        opened.of(OTHER).put({key: close})
    capsys.readouterr()
    assert reference("import", file, other) == 0
    said = capsys.readouterr().out
    assert "26 completions were added, 2 were there already" in said
    assert "2 are there with other values (by up to inf per token) and stay" in said
    with ReferenceStore.open(other) as opened:
        assert np.array_equal(opened.of(MODEL).get([key])[key], far)


def test_damaged_rows_are_left_out_and_mended_by_an_import(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, file = tmp_path / "good.parquet", tmp_path / "rows.parquet"
    assert reference("export", store, good) == 0
    with ReferenceStore.open(store) as opened, opened.writing() as connection:
        connection.execute("UPDATE logps SET crc = 1 WHERE key = ? AND model = 1", (row(3)[0],))
    assert reference("export", store, file) == 0
    assert "29 completions of 2 models are in" in (said := capsys.readouterr().out) and "1 damaged ones" in said
    assert reference("verify", store) == 74
    assert "1 rows are damaged" in capsys.readouterr().err
    assert reference("import", good, store) == 0 and reference("verify", store) == 0
    assert "all 30 rows are whole" in capsys.readouterr().out


def test_files_that_are_no_export_are_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, text, copy = tmp_path / "foreign.parquet", tmp_path / "text.parquet", tmp_path / "copy.sqlite"
    pq.write_table(pa.table({"prompt": ["a"]}), foreign)
    text.write_text("no parquet")
    for file, code, words in (
        (foreign, 65, "was not written by `reference export`"), (text, 74, "cannot be read as Parquet"),
        (tmp_path / "none.parquet", 74, "cannot be read as Parquet"),
    ):  # fmt: skip
        assert reference("import", file, copy) == code
        assert words in capsys.readouterr().err
    assert not copy.exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [([-1.0, float("nan")], "row 2 holds a log-prob that is not finite"), ([], "row 2 holds a completion"),
     (None, "row 2 holds nothing"), ([0.5], "row 2 holds a log-prob above 0")],
)  # fmt: skip
def test_row_without_log_probs_is_named(
    values: list[float] | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, store = tmp_path / "rows.parquet", tmp_path / "store.sqlite"
    schema = commands._SCHEMA.with_metadata({commands._MODELS: json.dumps({MODEL.fingerprint: MODEL.description})})
    columns = [[MODEL.fingerprint] * 2, [row(0)[0], row(1)[0]], [row(0)[1], values]]
    pq.write_table(pa.table(columns, schema=schema), file)
    assert reference("import", file, store) == 65
    assert words in capsys.readouterr().err
    with ReferenceStore.open(store) as opened:
        assert opened.models() == []


def test_export_that_cannot_be_written_leaves_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference("export", store, store / "rows.parquet") == 74
    assert "cannot be written" in capsys.readouterr().err
    before = sorted(tmp_path.iterdir())
    assert reference("export", tmp_path / "none.sqlite", tmp_path / "rows.parquet") == 74
    assert sorted(tmp_path.iterdir()) == before
