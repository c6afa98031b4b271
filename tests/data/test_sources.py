"""Files, folders, saved data sets and the Hub: rows with the line they stand on, or one clear sentence."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.data.files import readers
from qlora_dpo.data.files.readers import Row
from qlora_dpo.data.files.sources import open_source, read_rows
from qlora_dpo.data.formats import parse_row
from qlora_dpo.data.preferences import ColumnNames, RefusedRow
from qlora_dpo.errors import DataError, StorageError, UsageError

ROWS = [{"prompt": f"q{i} 你好\u2028", "chosen": "a", "rejected": 'b "quoted",\nwith a line'} for i in range(3)]


def origins(source: str, **options: str) -> list[str]:
    return [row.origin.removeprefix(source) for row in read_rows(source, **options)]


def values(source: str, **options: str) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(source, **options) if isinstance(row, Row)]


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def save(path: Path) -> str:
    """Write ROWS in the format that the suffix says."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    suffix = path.name.partition(".")[2]
    if suffix == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0])
            writer.writeheader()
            writer.writerows(ROWS)
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        content = (json.dumps(ROWS, indent=2) if suffix == "json" else lines).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    return str(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.csv", "a.parquet", "A.x.jsonl"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert values(save(tmp_path / name)) == ROWS


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("a.jsonl", [":1", ":2", ":3"]),
        ("a.json", [":2", ":7", ":12"]),
        ("a.csv", [":2", ":4", ":6"]),
        ("a.parquet", [":1", ":2", ":3"]),
    ],
)
def test_rows_are_named_by_the_line_they_start_on(tmp_path: Path, name: str, lines: list[str]) -> None:
    assert origins(save(tmp_path / name)) == lines


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_line_ends_and_blank_lines_do_not_matter(
    tmp_path: Path, name: str, mark: str, newline: str
) -> None:
    texts = {
        "a.jsonl": '\n{"a": "1"}\n\n{"a": "2"}',
        "a.json": '\n[{"a": "1"},\n\n{"a": "2"}]\n',
        "a.csv": "a\n1\n\n2",
    }
    path = write(tmp_path / name, (mark + texts[name]).replace("\n", newline))
    assert values(path) == [{"a": "1"}, {"a": "2"}]
    assert origins(path) == ([":2", ":4"])


def test_an_object_per_line_may_be_called_json(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]


def test_a_broken_line_is_one_refused_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": nan}\n{"a": 1\n[1]\n{"a": 1, "a": 2}\n')
    rows = list(read_rows(path))
    refused = [row for row in rows if isinstance(row, RefusedRow)]
    assert [row.origin for row in refused] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert refused[0].reason.startswith("broken JSON (") and "column 7" in refused[0].reason
    assert refused[2].reason == "a row must be an object (it is list)"
    assert values(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n{"a": ]', 2),
        ('[{"a": 1}\n{"a": 2}]', 2),
        ('[{"a": 1},\n]', 2),
        ('[{"a": 1}]\nx', 2),
        ("[" * 200_000, 1),
        ("[" + "9" * 5000 + "]", 1),
    ],
)
def test_a_broken_array_is_refused_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=rf"a\.json:{line}: broken JSON"):
        list(read_rows(path))


def test_arrays_are_read_whole_however_the_windows_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = [{"a": "é" * i, "b": [i, {"c": "\n"}]} for i in range(40)]
    path = write(tmp_path / "a.json", json.dumps([*objects, 12345, True], indent=1, ensure_ascii=False))
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(readers, "_CHUNK", size)
        rows = list(read_rows(path))
        assert [row.values for row in rows if isinstance(row, Row)] == objects
        assert [row.reason for row in rows if isinstance(row, RefusedRow)] == [
            "a row must be an object (it is int)",
            "a row must be an object (it is bool)",
        ]


@pytest.mark.parametrize(
    ("name", "before"),
    [("a.jsonl", '{"a": 1}\n{"a": "'), ("a.json", '[{"a": 1},\n{"a": "'), ("a.csv", "a\nx")],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_that_is_not_utf8_is_named_by_line_and_byte(tmp_path: Path, name: str, before: str, mark: str) -> None:
    content = (mark + before).encode() + b"\xff\xfe" + b'"}]'
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"{name}:2: not UTF-8 at byte {content.index(0xFF)} "):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file_holds_no_rows(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError):
        list(read_rows(write(tmp_path / name, "")))


def test_files_without_rows_say_so(tmp_path: Path) -> None:
    for name, text in (("a.json", " [ ]"), ("a.csv", "prompt,chosen\n"), ("a.jsonl", "\n\n")):
        with pytest.raises(DataError, match="holds no rows"):
            list(read_rows(write(tmp_path / name, text)))


@pytest.mark.parametrize("cut", [5, 30])
def test_a_truncated_gzip_file_is_a_data_error(tmp_path: Path, cut: int) -> None:
    path = Path(save(tmp_path / "a.jsonl.gz"))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match="not a whole gzip file"):
        list(read_rows(str(path)))


def test_a_broken_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    path = Path(save(tmp_path / "a.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[:-30] + b"\xff" * 22 + content[-8:])  # the end of the footer
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(str(path)))


def test_csv_faults(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a,b\n1\n1,2,3\n1,2\n")
    rows = list(read_rows(path))
    assert [type(row) for row in rows] == [RefusedRow, RefusedRow, Row]
    assert str(rows[1]) == f"{path}:3: csv: not as many cells as the header (3, header 2)"
    with pytest.raises(DataError, match=r"b\.csv:4: broken CSV"):
        list(read_rows(write(tmp_path / "b.csv", 'a,b\n1,2\n1,"2\n3,4\n')))
    with pytest.raises(DataError, match="the same name"):
        list(read_rows(write(tmp_path / "c.csv", "a,a\n1,2\n")))


def test_nan_and_infinity_in_json_lines_are_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": "NaN", "b": NaN}\n{"a": -Infinity, "b": 1}\n{"a": NaN, "b": }\n')
    first, second, third = read_rows(path)
    assert isinstance(first, Row) and first.values["a"] == "NaN" and math.isnan(first.values["b"])
    assert isinstance(second, Row) and second.values == {"a": -math.inf, "b": 1}
    assert isinstance(third, RefusedRow)


def test_csv_optional_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,chosen,rejected,category,confidence\nq,a,b,,\nq,a,b,math,0.5\n")
    pairs = [parse_row("plaintext", row, ColumnNames(), "").pair for row in values(path)]
    assert [(pair.category, pair.confidence) for pair in pairs] == [(None, 1.0), ("math", 0.5)]


def test_a_long_line_is_no_problem(tmp_path: Path) -> None:
    row = {"a": "x" * 5_000_000}
    for name, text in (
        ("a.jsonl", json.dumps(row)),
        ("a.json", json.dumps([row])),
        ("a.csv", "a\n" + row["a"]),
    ):
        assert values(write(tmp_path / name, text)) == [row]


def test_a_folder_reads_its_splits_off_the_names(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for name in (
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "my_test.jsonl",
        "dev.csv",
        "train_prefs-00000-of-00001.parquet",
    ):
        save(folder / name)
    write(folder / "dataset_infos.json", "{}")
    write(folder / "README.md", "x")
    assert len(values(str(folder))) == 6
    assert origins(str(folder), split="test") == ["/my_test.jsonl:1", "/my_test.jsonl:2", "/my_test.jsonl:3"]
    assert len(values(str(folder), split="validation")) == len(values(str(folder), split="train_prefs")) == 3
    with pytest.raises(UsageError, match=r"'eval'; there is test, train, train_prefs, validation"):
        values(str(folder), split="eval")


def test_a_folder_without_names_of_splits_is_all_train(tmp_path: Path) -> None:
    save(tmp_path / "one.jsonl")
    save(tmp_path / "two.csv")
    assert len(values(str(tmp_path))) == len(values(str(tmp_path), split="train")) == 6


def test_folders_without_data_or_without_train_say_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no file that ends with"):
        values(str(tmp_path))
    save(tmp_path / "test.jsonl")
    assert len(values(str(tmp_path))) == 3
    save(tmp_path / "dev.jsonl")
    with pytest.raises(UsageError, match="no split is named train"):
        values(str(tmp_path))


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    dataset = Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    assert values(str(tmp_path / "one")) == ROWS
    assert origins(str(tmp_path / "one")) == [":1", ":2", ":3"]
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert values(str(tmp_path / "two"), split="test") == ROWS[1:2]
    assert len(values(str(tmp_path / "two"))) == 3
    with pytest.raises(UsageError, match="there is test, train"):
        values(str(tmp_path / "two"), split="dev")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="does not load as a save_to_disk folder"):
        values(str(tmp_path / "one"))


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl")
    first = open_source(path).fingerprint()
    assert open_source(path).fingerprint() == first
    write(tmp_path / "a.jsonl", '{"prompt": "other"}')
    assert open_source(path).fingerprint() != first


@pytest.mark.parametrize(
    "name", ["nothing.jsonl", "./nothing", "/no/such/folder", "a/b/c", "x" * 5000, "a\0b", "~nobody-here/x"]
)
def test_a_missing_path_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError):
        values(name)


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="revision"):
        values(path, revision="main")
    with pytest.raises(UsageError, match="no split named 'test'; there is train"):
        values(path, split="test")
    with pytest.raises(UsageError, match="empty"):
        values("")
    with pytest.raises(UsageError, match="its name must end with one of"):
        values(write(tmp_path / "a.txt", "x"))


def _raise(error: Exception) -> Callable[..., Any]:
    def load(*_: object, **__: object) -> None:
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        ("DatasetNotFoundError:Dataset 'o/d' doesn't exist on the Hub", StorageError, "spelling"),
        ("DatasetNotFoundError:Dataset 'o/d' is a gated dataset on the Hub.\nMore", StorageError, "HF_TOKEN"),
        ("DatasetNotFoundError:Revision 'v9' doesn't exist for dataset 'o/d'", StorageError, "has no revision"),
        ("ConnectionError:Couldn't reach 'o/d' (OfflineModeIsEnabled)", StorageError, "HF_HUB_OFFLINE"),
        ("RuntimeError:", StorageError, "neither a local path nor reachable as a Hub id"),
        ('ValueError:Unknown split "dev". Should be one of [\'train\'].', UsageError, "there is train"),
    ],
)  # fmt: skip
def test_hub_faults_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str, expected: type[Exception], words: str
) -> None:
    import builtins

    import datasets
    from datasets.exceptions import DatasetNotFoundError

    kind, _, text = error.partition(":")
    make = DatasetNotFoundError if kind == "DatasetNotFoundError" else getattr(builtins, kind)
    monkeypatch.setattr(datasets, "load_dataset", _raise(make(text)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(expected) as caught:
        values("o/d", split="dev")
    assert words in str(caught.value) and "o/d" in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_data_set_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    calls = []

    def load(name: str, _config: str | None, **options: Any) -> Any:
        calls.append((name, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    rows = list(read_rows("owner/name", revision="abc"))
    assert rows == [Row(f"owner/name:{n}", row) for n, row in enumerate(ROWS, 1)]
    assert calls == [("owner/name", {"split": "train", "revision": "abc"})]
