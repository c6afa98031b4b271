"""Mutated data files: read as pairs and listed refusals, or refused with one of the tool's own errors."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.chaos.bench import Bench, Row, call
from benchmarks.chaos.breakages import BREAKAGES
from benchmarks.chaos.workload import byte_tokenizer

HANG_SECONDS = 30  # of the processor's time, for one small file
Pair = dict[str, Any]

PIECES = (
    b"", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b"NaN", b"-Infinity", b"1e999", b"null", b"true", b'"', b"'", b"[",
    b"]", b"{}", b"}", b"\xff", b"\xc3", b"\0", b",", b":", b"\\", b"\\ud800", b"\\u0000", b"\xe2\x80\xa8",
    b"\n\nHuman: ", b"\n\nAssistant: ", b"<|im_end|>", b'"chosen"', b'"prompt": ', b"[" * 3000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**400, 1.5, float("nan"), "", " ", "\n", "\ud800", "\0", "<|im_end|>", "a" * 50_000, [], [[]],
    [None], {}, {"role": "user"}, {"role": None, "content": None}, [{"role": "assistant", "content": ""}],
    [{"role": "user", "content": [{"type": "text", "text": "q"}]}], [{"role": "tool", "content": 3}],
    "\n\nHuman: a", "\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "\n\nAssistant: a\n\nAssistant: b",
)  # fmt: skip
KEYS = (
    "prompt", "chosen", "rejected", "category", "confidence", "id", "messages", "context", "conversations",
    "instruction", "input", "history", "system", "tools", "meta", "reference_chosen_log_prob", "",
)  # fmt: skip


@dataclass
class Fuzzed:
    """What became of the files."""

    by_kind: dict[str, list[tuple[str, list[str]]]] = field(default_factory=dict)
    """(trial, problems) of every file, by its kind."""
    ends: Counter[str] = field(default_factory=Counter)
    """accepted, or the class of the error."""
    seconds: float = 0.0


def fuzz_rows(bench: Bench, count: int) -> list[Row]:
    """Mutate small files of every format and container, and load each."""
    found: Fuzzed = call(fuzz, count, f"{bench.seed} fuzz", bench.breakage)
    row = Row("fuzz", "Any mutation of a data file: pairs plus listed refusals, or an error that names the trouble.")
    for trials in found.by_kind.values():
        for trial, problems in trials:
            row.trials += 1
            row.passed += not problems
            row.failures += [f"{trial}: {'; '.join(problems)}"] if problems else []
    ends = ", ".join(f"{times} {end}" for end, times in found.ends.most_common())
    row.worst = f"{found.ends['other exceptions']} other exceptions; {ends}"
    row.worst += f"; {count / found.seconds:.0f} files/s, {len(found.by_kind)} kinds of files"
    return [row]


def fuzz(count: int, seed: str, breakage: str | None) -> Fuzzed:
    """Load `count` mutated files. Runs in a fork."""
    if breakage:
        BREAKAGES[breakage]()
    tokenizer, found = byte_tokenizer(), Fuzzed()
    signal.signal(signal.SIGPROF, _hangs)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            kind = list(KINDS)[number % len(KINDS)]
            folder = Path(name) / str(number)
            folder.mkdir()
            file = folder / f"pairs.{kind.split()[1]}"
            file.write_bytes(mutated(kind, rng))
            end, problems = load(file, tokenizer, rng)
            found.ends[end] += 1
            found.by_kind.setdefault(kind, []).append((f"file {number + 1} ({kind})", problems))
            if number % 500 == 499:
                print(".", end="", file=sys.stderr, flush=True)
    found.seconds = time.perf_counter() - started
    return found


def load(file: Path, tokenizer: Any, rng: random.Random) -> tuple[str, list[str]]:
    """(how it ended, problems): rows in are pairs used plus rows reported, or the error is the tool's own."""
    from qlora_dpo.data.dataset import load_preference_dataset
    from qlora_dpo.errors import QloraDpoError

    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        dataset = load_preference_dataset(
            str(file), tokenizer=tokenizer, cache_dir=file.parent, max_length=64, max_prompt_length=32,
            bad_rows=rng.choice(["fail", "skip"]),
        )  # fmt: skip
        report = dataset.report
        for index in range(len(dataset)):
            dataset[index]
        if report.rows_read != len(dataset) + len(report.refused):
            lost = f"{report.rows_read} rows read, {len(dataset)} used, {len(report.refused)} reported"
            return "rows lost", [lost]
        return "accepted", []
    except QloraDpoError as error:
        return type(error).__name__, [] if str(error) else ["an error without a sentence"]
    except Exception as error:  # whatever it is, the user sees a traceback
        return "other exceptions", [f"{type(error).__name__}: {str(error)[:200]}"]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _hangs(_number: int, _frame: FrameType | None) -> None:
    raise RuntimeError(f"not read within {HANG_SECONDS} s")


def mutated(kind: str, rng: random.Random) -> bytes:
    """A good file with one to three faults: in its values before it is written, in its bytes afterwards, or both."""
    layout, container = kind.split()
    rows = [LAYOUTS[layout](f"q{number}", f"a{number}", f"b{number}") for number in range(rng.randint(1, 5))]
    faults = rng.randint(1, 3)
    in_values = rng.randint(0, faults)
    for _ in range(in_values):
        change_value(rows, rng)
    try:
        content = bytearray(CONTAINERS[container](rows))
    except (ValueError, TypeError, OverflowError, UnicodeError):  # no such file can be written
        return mutated(kind, rng)
    for _ in range(faults - in_values):
        change_bytes(content, rng)
    return bytes(content)


def change_value(rows: list[Pair], rng: random.Random) -> None:
    """Another value, another key, one key less, or a repeated row."""
    row = rng.choice(rows)
    what = rng.randrange(5)
    if what <= 1:
        row[rng.choice([*row, *KEYS])] = rng.choice(VALUES)
    elif what == 2 and row:
        row.pop(rng.choice(list(row)))
    elif what == 3 and row:
        row[rng.choice(KEYS)] = row.pop(rng.choice(list(row)))
    else:
        rows.insert(rng.randrange(len(rows)), dict(row))


def change_bytes(content: bytearray, rng: random.Random) -> None:
    """A piece written over or between, a bit flipped, or the end cut off."""
    place = rng.randint(0, len(content))
    what = rng.randrange(4)
    if what <= 1:
        content[place : place + rng.choice([0, 1, 5, 10_000])] = rng.choice(PIECES)
    elif what == 2 and place < len(content):
        content[place] ^= 1 << rng.randrange(8)
    else:
        del content[place:]


def _hh(prompt: str, chosen: str, rejected: str) -> Pair:
    before = f"\n\nHuman: {prompt}\n\nAssistant: "
    return {"chosen": before + chosen, "rejected": before + rejected}


def _plain(prompt: str, chosen: str, rejected: str) -> Pair:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "category": "c", "confidence": 0.5}


def _messages(prompt: str, chosen: str, rejected: str) -> Pair:
    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return {
        "prompt": said("user", prompt),
        "chosen": said("assistant", chosen),
        "rejected": said("assistant", rejected),
    }


def _opendpo(prompt: str, chosen: str, rejected: str) -> Pair:
    return {
        "context": [{"role": "user", "content": prompt}],
        "chosen": {"role": "assistant", "content": chosen},
        "rejected": {"role": "assistant", "content": rejected},
        "reference_chosen_log_prob": -1.5,
        "reference_rejected_log_prob": -2,
        "meta": {"category_id": 1, "category_name": "c"},
    }


def _sharegpt(prompt: str, chosen: str, rejected: str) -> Pair:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": prompt}]
    return {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": chosen},
        "rejected": {"from": "gpt", "value": rejected},
        "system": "s",
    }


def _alpaca(prompt: str, chosen: str, rejected: str) -> Pair:
    texts = {"instruction": prompt, "input": "i", "chosen": chosen, "rejected": rejected, "system": "s"}
    return texts | {"history": [["a", "b"]]}


LAYOUTS: dict[str, Callable[[str, str, str], Pair]] = {
    "hh-rlhf": _hh,
    "plaintext": _plain,
    "messages": _messages,
    "opendpo": _opendpo,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def _jsonl(rows: list[Pair]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def _csv(rows: list[Pair]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def _parquet(rows: list[Pair]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), buffer)
    except pa.ArrowException as error:
        raise ValueError(str(error)) from error
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[list[Pair]], bytes]] = {
    "jsonl": _jsonl,
    "json": lambda rows: json.dumps(rows).encode(),
    "jsonl.gz": lambda rows: gzip.compress(_jsonl(rows)),
    "csv": _csv,
    "parquet": _parquet,
}
KINDS = tuple(
    f"{layout} {container}"
    for layout in LAYOUTS
    for container in CONTAINERS
    if container != "csv" or layout in ("hh-rlhf", "plaintext")  # a cell of a CSV file holds no list
)
