"""Mixture files: what they may say, what is a mixture, the table of `data mix` and the rows that it writes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from qlora_dpo.config.data import MixOptions
from qlora_dpo.data.mixtures.mix import mix
from qlora_dpo.data.mixtures.mixture import CategoryRate, is_mixture, read_mixture
from qlora_dpo.errors import DataError, StorageError, UsageError

OPENDPO_RATIO = {
    "data_name": "opendpo",
    "data_path": "pairs.jsonl",
    "ratio": [
        {"category_id": 1, "category_name": "math", "size": 4, "sample_rate": 1.5},
        {"category_id": 2, "category_name": "", "size": 4, "sample_rate": 0.5},
    ],
}


def pairs(count: int, category: str | None = None, start: int = 0) -> list[dict[str, Any]]:
    """Rows of text that differ."""
    more = {} if category is None else {"category": category}
    return [
        {"prompt": f"w{n + 3}", "chosen": f"w{n + 4} w5", "rejected": f"w{n + 4} w6", **more}
        for n in range(start, start + count)
    ]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write rows (a list, into .jsonl) or a mixture (into .yaml or .json)."""

    def to_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        else:
            path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
        return path

    return to_file


Write = Callable[[str, Any], Path]


def refused(write: Write, content: Any) -> str:
    with pytest.raises(DataError) as error:
        read_mixture(write("mix.yaml", content))
    return str(error.value)


# What is a mixture


def test_yaml_and_opendpos_ratio_file_are_mixtures_and_pairs_are_none(write: Write, tmp_path: Path) -> None:
    for name, content in (("a.yaml", {}), ("b.yml", []), ("ratio.json", OPENDPO_RATIO), ("c.json", {"ratio": []})):
        assert is_mixture(str(write(name, content))), name
    row = pairs(1)[0]
    (tmp_path / "lines.json").write_text("".join(json.dumps(row | {"ratio": [{}]}) + "\n" for _ in range(3)))
    (tmp_path / "broken.json").write_text('{"ratio": [')
    for name, content in (
        ("array.json", [row]),
        ("row.json", row),
        ("odd.json", row | {"ratio": 0.5}),
        ("p.jsonl", [row]),
    ):
        assert not is_mixture(str(write(name, content))), name
    for name in (tmp_path / "lines.json", tmp_path / "broken.json", tmp_path, tmp_path / "none.json", "owner/name"):
        assert not is_mixture(str(name)), name


# What a mixture file may say


def test_every_key_of_a_source_is_read(write: Write, tmp_path: Path) -> None:
    data = write("data.jsonl", pairs(2))
    source, named = read_mixture(
        write(
            "mix.yaml",
            {
                "sources": [
                    {"path": "data.jsonl"},
                    {
                        "path": "owner/name", "name": "hub", "format": "plaintext", "split": "test",
                        "revision": "v1", "config": "c",
                        "chosen_key": "good", "sample_rate": 2,
                        "ratio": [{"category_name": "math", "sample_rate": 0.5}, {"category_id": 7}],
                    },
                ]
            },
        )
    ).sources  # fmt: skip
    assert (source.path, source.name, source.sample_rate, source.format) == (str(data), "data", 1.0, "auto")
    assert (named.path, named.name, named.split, named.revision) == ("owner/name:c", "hub", "test", "v1")
    assert named.keys == {"chosen_key": "good"} and named.format == "plaintext"
    assert [named.rate_of(category) for category in ("math", "7", "other", None)] == [0.5, 1.0, 2.0, 2.0]
    assert read_mixture(write("list.yaml", [{"path": "data.jsonl"}])).sources == (source,)


def test_opendpos_ratio_file_is_read_as_it_is(write: Write, tmp_path: Path) -> None:
    write("pairs.jsonl", pairs(1))
    (source,) = read_mixture(write("ratio.json", OPENDPO_RATIO)).sources
    assert source.path == str(tmp_path / "pairs.jsonl") and source.name == "opendpo"
    assert source.ratio[:2] == (CategoryRate(1.5, 1, "math", 4), CategoryRate(0.5, 2, None, 4))
    assert [source.rate_of(category) for category in ("math", "2", "new")] == [1.5, 0.5, 1.0]
    assert source.rate_of("0") == 0  # which OpenDPO counts nowhere
    listed = {**OPENDPO_RATIO, "ratio": [{"category_id": 0, "category_name": "rest", "sample_rate": 0.5}]}
    assert read_mixture(write("listed.json", listed)).sources[0].rate_of("rest") == 0.5


def test_name_counts_before_number(write: Write) -> None:
    ratio = [{"category_id": 1, "sample_rate": 3}, {"category_name": "1", "sample_rate": 5}]
    (source,) = read_mixture(write("mix.yaml", [{"path": "a/b", "ratio": ratio}])).sources
    assert source.rate_of("1") == 5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([{"path": "x", "sample_rat": 2}], "sources[0]: 'sample_rat' is not a key of it; the nearest is sample_rate"),
        ({"source": [{"path": "x"}]}, "'source' is not a key of it; the nearest is sources"),
        ({"data_path": "x", "ratios": []}, "'ratios' is not a key of it; the nearest is ratio"),
        ([{"path": "x", "ratio": [{"category": "a"}]}], "ratio[0]: 'category' is not a key of it; the nearest is cat"),
        ([{"path": "x"}, {"sample_rate": 2}], "sources[1]: no path"),
        ([{"path": "x", "sample_rate": -1}], "sample_rate: must be a number from 0"),
        ([{"path": "x", "sample_rate": "twice"}], "it is 'twice'"),
        ([{"path": "x", "sample_rate": True}], "it is True"),
        ([{"path": "x", "sample_rate": float("nan")}], "it is nan"),
        ([{"path": "x", "sample_rate": float("inf")}], "it is inf"),
        ([{"path": "x", "ratio": [{"sample_rate": 1}]}], "ratio[0]: names no category"),
        ([{"path": "x", "ratio": [{"category_id": 1}, {"category_id": 1}]}], "category_id 1 stands there twice"),
        ([{"path": "x", "ratio": [{"category_id": 1.5}]}], "category_id: must be a whole number"),
        ([{"path": "x", "ratio": {"math": 2}}], "ratio: must be a list of categories"),
        ([{"path": ["x"]}], "path: must be text"),
        (["x.jsonl"], "sources[0]: must be keys with values"),
        ({"data_name": "d", "ratio": []}, "no data_path"),
        ([], "names no sources"),
        (None, "names no sources"),
        ("x", "names no sources"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_place(content: Any, words: str, write: Write) -> None:
    message = refused(write, content)
    assert words in message and "mix.yaml" in message


def test_unreadable_files_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("sources: [")
    with pytest.raises(DataError, match=r"bad\.yaml is not readable as a mixture"):
        read_mixture(tmp_path / "bad.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"sources: \xff")
    with pytest.raises(DataError, match=r"latin\.yaml is not readable as a mixture"):
        read_mixture(tmp_path / "latin.yaml")
    with pytest.raises(StorageError, match="cannot read the mixture"):
        read_mixture(tmp_path / "none.yaml")


# The command


@pytest.fixture
def mixture(write: Write) -> Path:
    """Two files of three forms: math and chat as text, dialogues, and messages without a category."""
    write("a.jsonl", [*pairs(8, "math"), *pairs(10, "chat", 20)])
    message = {"role": "user", "content": "w9"}
    answers = [{"role": "assistant", "content": f"w{n}"} for n in (10, 11)]
    write("b.jsonl", [{"prompt": [message], "chosen": [answers[0]], "rejected": [answers[1]]} for _ in range(4)])
    dialogue = "\n\nHuman: w7\n\nAssistant: w"
    write("c.jsonl", [{"chosen": dialogue + "8", "rejected": dialogue + "9", "confidence": 0.75}])
    ratio = [{"category_name": "math", "sample_rate": 1.5, "size": 8}, {"category_name": "chat", "sample_rate": 0.3}]
    return write(
        "mix.yaml",
        [{"path": "a.jsonl", "ratio": ratio}, {"path": "b.jsonl", "sample_rate": 0}, {"path": "c.jsonl", "name": "hh"}],
    )


def test_table_says_what_an_epoch_is_made_of(mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mix(MixOptions(file=mixture))
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table == [
        ["category", "source", "rows", "rate", "per", "epoch", "share"],
        ["math", "a", "8", "1.5", "12", "75.0%"],
        ["chat", "a", "10", "0.3", "3", "18.8%"],
        ["-", "b", "4", "0", "0", "0.0%"],
        ["-", "hh", "1", "1", "1", "6.2%"],
        ["together", "23", "16"],
    ]


def test_output_holds_the_rows_of_the_epoch_of_all_forms(mixture: Path, tmp_path: Path) -> None:
    from qlora_dpo.data.formats import ColumnNames, parse_row

    number = itertools.count()

    def written(epoch: int, seed: int = 42) -> list[dict[str, Any]]:
        output = tmp_path / f"out-{next(number)}.jsonl"
        mix(MixOptions(file=mixture, output=output, epoch=epoch, seed=seed))
        return [json.loads(line) for line in output.read_text().splitlines()]

    first, again, second = written(0), written(0), written(1)
    assert first == again and first != second != written(1, seed=43)
    for rows in (first, second):
        assert Counter(row["category"] for row in rows) == {"math": 12, "chat": 3, "hh": 1}
        taken = Counter(row["origin"] for row in rows)
        assert {taken[f"{tmp_path / 'a.jsonl'}:{line}"] for line in range(1, 9)} == {1, 2}
    last = first[-1]
    assert last == {
        "prompt": [{"role": "user", "content": "w7"}],
        "chosen": [{"role": "assistant", "content": "w8"}],
        "rejected": [{"role": "assistant", "content": "w9"}],
        "category": "hh", "confidence": 0.75, "origin": f"{tmp_path / 'c.jsonl'}:1",
    }  # fmt: skip
    assert parse_row("messages", last, ColumnNames(), "x").pair.chosen == "w8"
    mix(MixOptions(file=mixture, output=tmp_path / "out.parquet"))
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["origin"].to_pylist() == [row["origin"] for row in first]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_log_probs_of_a_reference_are_kept(write: Write, tmp_path: Path) -> None:
    answers = {name: {"role": "assistant", "content": name} for name in ("chosen", "rejected")}
    row = {"context": [{"role": "user", "content": "w3"}], **answers, "reference_chosen_log_prob": -1.5,
           "reference_rejected_log_prob": -2.5, "meta": {"category_id": 1, "category_name": "math"}}  # fmt: skip
    write("pairs.jsonl", [row])
    write("text.jsonl", pairs(1))
    mix(
        MixOptions(
            file=write("mix.yaml", [{"path": "pairs.jsonl"}, {"path": "text.jsonl"}]), output=tmp_path / "o.jsonl"
        )
    )
    kept, text = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert (kept["reference_chosen_log_prob"], kept["reference_rejected_log_prob"]) == (-1.5, -2.5)
    assert kept["meta"] == {"category_name": "math"} and text["meta"] == {"category_name": "text"}


def test_differences_to_what_the_file_expects_are_noted(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("pairs.jsonl", [*pairs(3, "math"), *pairs(2, "2"), *pairs(1, "0"), *pairs(1, "new"), *pairs(1)])
    ratio = [*OPENDPO_RATIO["ratio"], {"category_id": 3, "category_name": "maths"}]
    mix(MixOptions(file=write("ratio.json", {**OPENDPO_RATIO, "ratio": ratio})))
    notes = [line.partition("pairs.jsonl: ")[2] for line in capsys.readouterr().err.splitlines() if "note:" in line]
    assert notes == [
        "category 0: left out, number 0 without a rate above 0 (rows: 1)",
        "category new: not in ratio, taken at rate 1 (rows: 1)",
        "no category: not in ratio, taken at rate 1 (rows: 1)",
        "category math: size 4 in ratio, found 3",
        "category 2: size 4 in ratio, found 2",
        "category maths: in ratio, but no row has it; the nearest is math",
    ]


def test_bad_rows_stop_or_are_counted(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", [*pairs(3), {"prompt": "w3", "chosen": "w4"}])
    mixture = write("mix.yaml", [{"path": "a.jsonl"}])
    with pytest.raises(DataError, match=r"a\.jsonl:4: rejected: missing"):
        mix(MixOptions(file=mixture))
    mix(MixOptions(file=mixture, bad_rows="skip"))
    assert "1 x rejected: missing" in capsys.readouterr().err


def test_what_cannot_work_is_refused(write: Write, tmp_path: Path) -> None:
    data = write("a.jsonl", pairs(3))
    mixture = write("mix.yaml", [{"path": "a.jsonl"}])
    before = data.read_bytes()
    with pytest.raises(UsageError, match="is read from"):
        mix(MixOptions(file=mixture, output=data))
    assert data.read_bytes() == before
    for name in ("out.csv", "out.yaml", "out"):
        with pytest.raises(UsageError, match=r"its name must end with one of \.jsonl, "):
            mix(MixOptions(file=mixture, output=tmp_path / name))
    with pytest.raises(UsageError, match="--epoch -1"):
        mix(MixOptions(file=mixture, epoch=-1))
    with pytest.raises(StorageError, match="cannot be written: No such file or directory"):
        mix(MixOptions(file=mixture, output=tmp_path / "none" / "out.jsonl"))
    with pytest.raises(DataError, match="leaves no row of 3: raise a sample_rate"):
        mix(MixOptions(file=write("none.yaml", [{"path": "a.jsonl", "sample_rate": 0}])))
    with pytest.raises(StorageError, match=r"gone\.jsonl"):
        mix(MixOptions(file=write("gone.yaml", [{"path": "gone.jsonl"}])))


def test_output_is_whole_or_not_there(mixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr("qlora_dpo.data.mixtures.mix._row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mix(MixOptions(file=mixture, output=output))
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_real_rows_are_mixed(shared_data: Path, write: Write, tmp_path: Path) -> None:
    ratio = [{"category_name": "math", "sample_rate": 1.5}, {"category_name": "rewrite", "sample_rate": 0.3}]
    sources = [
        {"path": str(shared_data / "belle_pairs_hh.jsonl"), "ratio": ratio},
        {"path": str(shared_data / "hh_rlhf_harmless_600.jsonl"), "name": "harmless", "sample_rate": 0.1},
    ]
    mix(MixOptions(file=write("mix.yaml", sources), output=tmp_path / "out.jsonl", bad_rows="skip"))
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    counts = Counter(row["category"] for row in rows)
    assert (counts["math"], counts["rewrite"], counts["harmless"]) == (78, 6, 60)
