"""`data convert`: every format through every kind of file and back, what has no place, and every row accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main
from qlora_dpo.config.data import ConvertOptions, PairFileOptions
from qlora_dpo.config.values import Names
from qlora_dpo.data.convert import DROPS, convert
from qlora_dpo.data.files import writers
from qlora_dpo.data.files.readers import Row
from qlora_dpo.data.files.sources import open_source, read_rows
from qlora_dpo.data.formats import WRITTEN, ColumnNames, write_row
from qlora_dpo.data.pair_reader import PairReader
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow
from qlora_dpo.errors import DataError, UsageError

SUFFIXES = [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]
NESTED = ("messages", "opendpo", "sharegpt")
QUESTION = 'q "quoted", 你好\u2028\nand\r a line'
PAIRS = [
    PreferencePair(QUESTION, "x", "y\n\nz", category="math"),
    PreferencePair("second", ",", '"', confidence=0.25),
    PreferencePair("third \0", "a", "b", category="c", confidence=1e-3),
]
SYSTEM: Message = {"role": "system", "content": "s"}
TURNS: tuple[Message, ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)


def rows_as(name: str, pairs: list[PreferencePair]) -> list[dict[str, Any]]:
    return [write_row(name, pair) for pair in pairs]


def pairs_of(path: Path, name: str = "auto") -> list[PreferencePair]:
    reader = PairReader(open_source(str(path)), name, ColumnNames())
    pairs = []
    for number, row in enumerate(reader):
        assert not isinstance(row, RefusedRow), row
        pairs.append(PreferencePair(row.messages, row.chosen, row.rejected, row.category, row.confidence, str(number),
                                    row.reference_logps))  # fmt: skip
    return pairs


def converted(file: str | Path, to: str, output: Path, **more: Any) -> None:
    """What the command does with these options."""
    about_pairs = {name: more.pop(name) for name in ("dataset_format", "split") if name in more}
    convert(PairFileOptions(str(file), **about_pairs), ConvertOptions(to, output, **more))


@pytest.fixture
def out(tmp_path: Path) -> Callable[[str], Path]:
    """Give a new file name with a suffix."""
    numbers = count()
    return lambda suffix: tmp_path / f"out{next(numbers)}{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", WRITTEN)
def test_every_format_goes_through_every_kind_of_file_and_back(
    write_jsonl: Callable[..., str], out: Callable[[str], Path], name: str, suffix: str
) -> None:
    if suffix == ".csv" and name in NESTED:
        pytest.skip("a CSV file holds text only")
    start = Path(write_jsonl(rows_as("plaintext", PAIRS)))
    there, back = out(suffix), out(".jsonl")
    converted(start, name, there)
    converted(there, "plaintext", back)
    assert pairs_of(there) == pairs_of(back) == pairs_of(start)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", ["messages", "opendpo", "sharegpt", "alpaca"])
def test_turns_and_system_prompts_come_back_the_same(
    write_jsonl: Callable[..., str], out: Callable[[str], Path], name: str, suffix: str
) -> None:
    pairs = [PreferencePair((SYSTEM, *TURNS), "x", "y", "c", 0.5), PreferencePair(TURNS, "x", "y")]
    pairs += [PreferencePair("q", "x", "y")]
    start = Path(write_jsonl(rows_as("messages", pairs)))
    there, back = out(suffix), out(".jsonl")
    converted(start, name, there)
    converted(there, "messages", back)
    assert pairs_of(there) == pairs_of(back) == pairs_of(start)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_log_probs_stay_in_opendpo(write_jsonl: Callable[..., str], out: Callable[[str], Path], suffix: str) -> None:
    pairs = [PreferencePair("q", "x", "y", reference_logps=(-1.5, -115.16470484400884)), PreferencePair("q", "x", "y")]
    start, there = Path(write_jsonl(rows_as("opendpo", pairs))), out(suffix)
    converted(start, "opendpo", there)
    assert [pair.reference_logps for pair in pairs_of(there)] == [pair.reference_logps for pair in pairs]


def test_more_rows_than_a_batch_are_all_written(
    write_jsonl: Callable[..., str], out: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "_PARQUET_ROWS", 3)
    start = Path(write_jsonl({"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(8)))
    there = out(".parquet")
    converted(start, "sharegpt", there)
    assert pairs_of(there) == pairs_of(start)


LOSING = {
    "system": (PreferencePair((SYSTEM, TURNS[0]), "x", "y"), "plaintext", "a system prompt"),
    "history": (PreferencePair(TURNS, "x", "y"), "plaintext", "earlier turns"),
    "whitespace": (PreferencePair(" q\n", "x", "y"), "hh-rlhf", "white space around a turn"),
    "reference_logps": (PreferencePair("q", "x", "y", reference_logps=(-1.0, -2.0)), "plaintext", "log-probs"),
}


@pytest.mark.parametrize("drop", LOSING)
def test_what_has_no_place_is_lost_only_when_asked(
    write_jsonl: Callable[..., str], out: Callable[[str], Path], capsys: pytest.CaptureFixture[str], drop: str
) -> None:
    pair, to, words = LOSING[drop]
    start = write_jsonl(rows_as("opendpo", [pair]))
    others = Names([name for name in DROPS if name != drop])
    with pytest.raises(DataError, match=rf"no place for {words}.*\(--drop {drop}\)"):
        converted(start, to, out(".jsonl"), drop=others)
    written = out(".jsonl")
    converted(start, to, written, drop=Names(list(DROPS)))
    assert len(pairs_of(written)) == 1
    assert capsys.readouterr().out.count("dropped:") == 1


def test_nothing_is_dropped_that_has_a_place(write_jsonl: Callable[..., str], out: Callable[[str], Path]) -> None:
    pair = PreferencePair((SYSTEM, *TURNS), "x ", "y", reference_logps=(-1.0, -2.0))
    start, there = write_jsonl(rows_as("opendpo", [pair])), out(".jsonl")
    converted(start, "alpaca", there, drop=Names(list(DROPS)))
    (row,) = [row.values for row in read_rows(str(there)) if isinstance(row, Row)]
    assert row["system"] == "s" and row["history"] == [["a", "b"]] and row["chosen"] == "x "


def test_earlier_turns_have_no_place_in_csv(write_jsonl: Callable[..., str], out: Callable[[str], Path]) -> None:
    start = write_jsonl(rows_as("messages", [PreferencePair((SYSTEM, *TURNS), "x", "y")]))
    with pytest.raises(
        DataError, match=r"history: the format has no place for a list in a CSV file \(--drop history\)"
    ):
        converted(start, "alpaca", out(".csv"))
    there = out(".csv")
    converted(start, "alpaca", there, drop=Names("history"))
    (pair,) = pairs_of(there)
    assert [message["content"] for message in pair.messages] == ["s", "c"]


BAD = [
    {"prompt": "q", "chosen": "a", "rejected": "b"},
    "{broken",
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"prompt": "q2", "chosen": "a", "rejected": "b"},
    {"prompt": "q", "chosen": " a", "rejected": "b"},
]


def test_bad_rows_stop_it_and_nothing_is_written(write_jsonl: Callable[..., str], out: Callable[[str], Path]) -> None:
    start, there = write_jsonl(BAD), out(".jsonl")
    with pytest.raises(DataError) as error:
        converted(start, "hh-rlhf", there)
    assert "3 of 5 rows" in str(error.value) and "write the other 2 with --bad_rows skip" in str(error.value)
    for place in (f"{start}:2: json: ", f"{start}:3: rejected: the same answer as chosen", f"{start}:5: text: "):
        assert place in str(error.value)
    listed = [json.loads(line) for line in Path(f"{there}.refused").read_text().splitlines()]
    assert [row["origin"] for row in listed] == [f"{start}:{line}" for line in (2, 3, 5)]
    assert sorted(path.name for path in there.parent.iterdir()) == ["out0.jsonl.refused", "pairs.jsonl"]
    converted(start, "hh-rlhf", there, bad_rows="skip")  # a list of refused rows is the tool's own
    with pytest.raises(UsageError, match=r"out0\.jsonl exists"):
        converted(start, "hh-rlhf", there, bad_rows="skip")


def test_bad_rows_can_be_left_out_and_are_counted(
    write_jsonl: Callable[..., str], out: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    start, there = write_jsonl(BAD), out(".json")
    converted(start, "hh-rlhf", there, bad_rows="skip")
    printed = capsys.readouterr().out
    assert f"{start}: 2 pairs from 5 rows (plaintext) are in {there} (hh-rlhf)" in printed
    assert f"refused: 3 rows, listed in {there}.refused" in printed
    assert "1 x text: the format has no place for white space around a turn\n" in printed
    assert len(pairs_of(there)) == 2
    there.unlink()
    converted(write_jsonl(BAD[:1]), "hh-rlhf", there)
    assert not Path(f"{there}.refused").exists()


def test_repairs_are_counted(
    write_jsonl: Callable[..., str], out: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = "\n\nHuman: a\n\nHuman: b\n\nAssistant: "
    start = write_jsonl([{"chosen": before + "x", "rejected": before + "y"}])
    converted(start, "messages", out(".jsonl"))
    assert "repaired: 1 x two turns in a row" in capsys.readouterr().out


def test_when_no_row_can_be_written_it_says_so(write_jsonl: Callable[..., str], out: Callable[[str], Path]) -> None:
    with pytest.raises(DataError, match="2 of 2 rows"):
        converted(write_jsonl(BAD[1:3]), "messages", out(".jsonl"), dataset_format="plaintext", bad_rows="skip")


def test_what_cannot_work_is_refused_by_name(write_jsonl: Callable[..., str], out: Callable[[str], Path]) -> None:
    start = write_jsonl(BAD[:1])
    for change, words in (
        ({"to": "opendop"}, "Did you mean opendpo"),
        ({"dataset_format": "plain"}, "Did you mean plaintext"),
        ({"drop": Names("sytem")}, "the nearest is system"),
        ({"output": out(".txt")}, "must end with one of .jsonl"),
        ({"output": out(".csv"), "to": "messages"}, "a CSV file holds text only"),
        ({"output": Path(start)}, f"is where {start} is read from"),
        ({"split": "test"}, "no split named 'test'"),
    ):
        values = {"file": start, "to": "messages", "output": out(".jsonl"), **change}
        with pytest.raises(UsageError, match=words):
            converted(**values)


def test_an_output_within_the_source_folder_is_refused(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    write_jsonl(BAD[:1])
    with pytest.raises(UsageError, match="is read from"):
        converted(tmp_path, "messages", tmp_path / "sub.jsonl")


def test_the_command_reads_named_columns(
    write_jsonl: Callable[..., str], out: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    start, there = write_jsonl([{"question": "q", "good": "a", "bad": "b"}]), out(".parquet")
    flags = ["--prompt_key", "question", "--chosen_key", "good", "--rejected_key", "bad"]
    assert main(["data", "convert", start, "--to", "alpaca", "--output", str(there), *flags]) == 0
    assert "1 pairs from 1 rows (plaintext)" in capsys.readouterr().out
    assert pairs_of(there)[0].messages == ({"role": "user", "content": "q"},)
    assert main(["data", "convert", start, "--to", "alpaca", "--output", str(out(".jsonl"))]) == UsageError.exit_code
    assert "cannot tell the format" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["belle_pairs_hh.jsonl", "hh_rlhf_harmless_600.jsonl"])
def test_real_rows_come_back_the_same(shared_data: Path, out: Callable[[str], Path], name: str) -> None:
    first = out(".jsonl")
    converted(shared_data / name, "hh-rlhf", first, bad_rows="skip")
    for to, suffix in (("opendpo", ".parquet"), ("sharegpt", ".json"), ("messages", ".jsonl"), ("alpaca", ".jsonl")):
        there, back = out(suffix), out(".jsonl")
        converted(first, to, there)
        converted(there, "hh-rlhf", back)
        assert back.read_bytes() == first.read_bytes()


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    """A gzip file says neither when nor under which hidden name it was written."""
    source, one, two = (tmp_path / name for name in ("pairs.jsonl", "one.jsonl.gz", "two.jsonl.gz"))
    source.write_text("".join(json.dumps(row) + "\n" for row in rows_as("messages", PAIRS)))
    for output in (one, two):
        converted(source, "messages", output)
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes()[3] == 0  # no flag of the header: no name follows
