"""The store keeps what it was given, whatever is done to its file, its disk or the processes that write it."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.reference import store_file
from qlora_dpo.reference.store import Logps, ModelIdentity, ModelRows, ReferenceStore, completion_key

ROOT = Path(__file__).resolve().parents[2]
MODEL, OTHER = ModelIdentity("a" * 64, {"model": "one"}), ModelIdentity("b" * 64, {"model": "two"})


def row(number: int, tokens: int = 20) -> tuple[bytes, Logps]:
    return completion_key([1, 2, number], [3]), -np.random.default_rng(number).random(tokens, np.float32)


def rows_of(*numbers: int) -> dict[bytes, Logps]:
    return dict(map(row, numbers))


def filled(path: Path, count: int = 300) -> Path:
    with ReferenceStore.open(path) as store:
        store.of(MODEL).put(rows_of(*range(count)))
    return path


def assert_whole(rows: ModelRows, numbers: range) -> None:
    found = rows.get([row(number)[0] for number in numbers])
    assert len(found) == len(numbers)
    for number in numbers:
        key, values = row(number)
        assert found[key].tobytes() == values.tobytes()


def test_rows_come_back_bit_by_bit_after_reopening(tmp_path: Path) -> None:
    path = filled(tmp_path / "deep" / "store.sqlite")
    for read_only in (False, True):
        with ReferenceStore.open(path, read_only=read_only) as store:
            rows = store.of(MODEL)
            assert len(rows) == 300 and store.problems() == []
            assert_whole(rows, range(300))
            assert rows.get([row(300)[0]]) == {} and rows.has([row(7)[0], row(300)[0]]) == {row(7)[0]}
            assert [list(batch) for batch in rows.batches(200)] == [
                [row(number)[0] for number in part] for part in (range(200), range(200, 300))
            ]


def test_key_tells_where_the_completion_begins() -> None:
    keys = {
        completion_key([1, 2], [3]),
        completion_key([1], [2, 3]),
        completion_key([1, 2, 3], []),
        completion_key([], []),
    }
    assert len(keys) == 4 and {len(key) for key in keys} == {16}
    assert completion_key((1, 2), np.array([3], np.int32)) == completion_key([1, 2], [3])


def test_models_are_kept_apart_and_described(tmp_path: Path) -> None:
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        assert store.models() == [] and len(store.of(MODEL)) == 0
        store.of(MODEL).put(rows_of(1, 2))
        store.of(OTHER).put(rows_of(2))
        assert len(store.of(OTHER)) == 1 and store.of(OTHER).get([row(1)[0]]) == {}
        assert [(model.identity, model.rows, model.tokens) for model in store.models()] == [
            (MODEL, 2, 40),
            (OTHER, 1, 20),
        ]


def test_rows_that_are_there_stay(tmp_path: Path) -> None:
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        rows = store.of(MODEL)
        rows.put(rows_of(1))
        rows.put({row(1)[0]: row(2)[1], **rows_of(3)})
        assert_whole(rows, range(1, 2))
        assert_whole(rows, range(3, 4))
        rows.discard([row(1)[0]])
        assert rows.has([row(1)[0]]) == set()


@pytest.mark.parametrize(
    ("values", "reason"),
    [([-1, np.nan], "not finite"), ([-np.inf], "not finite"), ([0.01], "above 0"), ([], "without tokens")],
)
def test_what_is_no_log_prob_is_refused_with_all_that_came_with_it(
    values: list[float], reason: str, tmp_path: Path
) -> None:
    with ReferenceStore.open(tmp_path / "store.sqlite") as store:
        with pytest.raises(ModelError, match=reason):
            store.of(MODEL).put({**rows_of(1), row(2)[0]: np.array(values, np.float32)})
        assert len(store.of(MODEL)) == 0
        store.of(MODEL).put({row(2)[0]: np.array([0.0, 9e-4], np.float32)})  # rounding


def test_damaged_row_is_missing_and_can_be_put_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = filled(tmp_path / "store.sqlite", 3)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE logps SET value = zeroblob(80) WHERE key = ?", (row(0)[0],))
        connection.execute("UPDATE logps SET value = substr(value, 1, 79) WHERE key = ?", (row(1)[0],))
    connection.close()
    with ReferenceStore.open(path) as store:
        rows = store.of(MODEL)
        for _ in range(2):
            assert list(rows.get([row(number)[0] for number in range(3)])) == [row(2)[0]]
        assert caplog.text.count("is damaged and counts as missing") == 2
        assert store.problems() == ["2 rows are damaged; they are computed again when asked for."]
        rows.put(rows_of(0, 1, 2))
        assert_whole(rows, range(3))
        assert store.problems() == [] and len(rows) == 3


# Files that are no store


def cut(size: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, size)


def garbage_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[store_file.PAGE : store_file.PAGE + 200] = bytes(200)
    path.write_bytes(content)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    "damage", [cut(50), cut(1000), cut(store_file.PAGE), cut(2 * store_file.PAGE), cut(2 * store_file.PAGE + 5)]
)
def test_store_that_was_cut_short_is_refused(damage: Callable[[Path], object], read_only: bool, tmp_path: Path) -> None:
    path = filled(tmp_path / "store.sqlite")
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"damaged or cut short|its beginning is lost"):
        ReferenceStore.open(path, read_only=read_only)
    assert path.read_bytes() == before


def test_store_with_a_hole_is_refused_or_known_to_be_damaged(tmp_path: Path) -> None:
    path = filled(tmp_path / "store.sqlite")
    garbage_inside(path)
    with pytest.raises(StorageError, match="damaged"), ReferenceStore.open(path) as store:
        raise StorageError(" ".join(store.problems()))


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text, folder, foreign = tmp_path / "pairs.jsonl", tmp_path / "folder", tmp_path / "foreign.sqlite"
    text.write_text("x" * 5000)
    folder.mkdir()
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE models (id INTEGER)")
    connection.close()
    for path, words in ((text, "no reference store"), (folder, "is a folder"), (foreign, "another program")):
        before = path.read_bytes() if path.is_file() else b""
        for read_only in (False, True):
            with pytest.raises(StorageError, match=words):
                ReferenceStore.open(path, read_only=read_only)
        assert (path.read_bytes() if path.is_file() else b"") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "foreign.sqlite", "pairs.jsonl"]


def test_store_of_another_version_says_both(tmp_path: Path) -> None:
    path = filled(tmp_path / "store.sqlite", 1)
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=7")
    connection.close()
    with pytest.raises(StorageError, match=r"the form 7 .* this version of the tool reads 1"):
        ReferenceStore.open(path)


def test_missing_store_is_not_made_to_be_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no reference store"):
        ReferenceStore.open(tmp_path / "store.sqlite", read_only=True)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"Not a directory|File exists"):
        ReferenceStore.open(filled(tmp_path / "file", 1) / "store.sqlite")


def test_store_in_a_folder_that_takes_no_files_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "store.sqlite")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with ReferenceStore.open(path, read_only=True) as store:
        assert_whole(store.of(MODEL), range(300))
        assert [file.name for file in tmp_path.iterdir()] == ["store.sqlite"]
    with ReferenceStore.open(path) as store:
        assert_whole(store.of(MODEL), range(300))
        with pytest.raises(StorageError, match="it may not be written"):
            store.of(MODEL).put(rows_of(300))


def test_on_a_shared_file_system_there_is_no_write_ahead_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "store.sqlite", 1)
    for kind, mode in (("nfs4", "delete"), ("ext4", "wal")):
        monkeypatch.setattr(store_file, "file_system", lambda _, kind=kind: kind)
        with ReferenceStore.open(path) as store, store.reading() as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == (mode,)
            store.of(MODEL).put(rows_of(2))
            assert len(store.of(MODEL)) == 2


def test_store_that_another_process_keeps_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "store.sqlite", 1)
    monkeypatch.setattr(store_file, "PATIENCE", 0.05)
    with ReferenceStore.open(path) as holder, ReferenceStore.open(path) as store, holder.writing():
        assert_whole(store.of(MODEL), range(1))  # readers do not wait
        with pytest.raises(StorageError, match="another process has kept it locked"):
            store.of(MODEL).put(rows_of(2))


# Disks that are full


def test_full_disk_refuses_the_new_rows_and_keeps_the_old(tmp_path: Path) -> None:
    with ReferenceStore.open(filled(tmp_path / "store.sqlite")) as store:
        with store.reading() as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages}")
        with pytest.raises(StorageError, match="disk is full"):
            store.of(MODEL).put(rows_of(*range(300, 2000)))
        assert_whole(store.of(MODEL), range(300))
        assert len(store.of(MODEL)) == 300 and store.problems() == []
        with store.reading() as connection:
            connection.execute("PRAGMA max_page_count=100000")
        store.of(MODEL).put(rows_of(*range(300, 2000)))
        assert_whole(store.of(MODEL), range(2000))


LIMITED = """
import resource, sys
from pathlib import Path
from reference.test_store import MODEL, rows_of
from qlora_dpo.errors import StorageError
from qlora_dpo.reference.store import ReferenceStore
try:
    with ReferenceStore.open(Path(sys.argv[1])) as store:
        for number in range(0, 20_000, 100):
            store.of(MODEL).put(rows_of(*range(number, number + 100)))
            print(number + 100, flush=True)
except StorageError as error:
    print(error, file=sys.stderr)
    sys.exit(74)
"""


def start(code: str, *arguments: object, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,  # type: ignore[call-overload]
    )  # fmt: skip


@pytest.mark.parametrize("limit", [0, 20_000, 60_000, 400_000])
def test_system_that_refuses_larger_files_leaves_a_sound_store(limit: int, tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    process = start(LIMITED, path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    said, error = process.communicate(timeout=120)
    assert process.returncode == 74 and error.startswith("the reference store ") and "Traceback" not in error
    written = int(said.split()[-1]) if said.split() else 0
    assert (written > 0) == (limit == 400_000)
    with ReferenceStore.open(path) as store:
        assert_whole(store.of(MODEL), range(written))
        assert store.problems() == []
        store.of(MODEL).put(rows_of(30_000))


# Processes


WRITER = """
import sys, time
from pathlib import Path
from reference.test_store import MODEL, row, rows_of
from qlora_dpo.reference.store import ReferenceStore
path, own = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with ReferenceStore.open(path) as store:
    for number in range(0, 200, 10):
        store.of(MODEL).put(rows_of(*range(number, number + 10), *range(own + number, own + number + 10)))
        assert len(store.of(MODEL).get([row(place)[0] for place in range(number + 10)])) == number + 10
"""


@pytest.mark.slow
def test_processes_make_and_fill_one_store_together(tmp_path: Path) -> None:
    path, count = tmp_path / "store.sqlite", 4
    writers = [start(WRITER, path, 1000 * (number + 1), stdin=subprocess.PIPE) for number in range(count)]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, error = writer.communicate(timeout=120)
        assert writer.returncode == 0, error
    with ReferenceStore.open(path, read_only=True) as store:
        assert len(store.of(MODEL)) == 200 * (count + 1) and len(store.models()) == 1
        for first in range(0, 1000 * (count + 1), 1000):
            assert_whole(store.of(MODEL), range(first, first + 200))
        assert store.problems() == []


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_sound_store(tmp_path: Path) -> None:
    rng, path, seen = random.Random(4), tmp_path / "store.sqlite", []
    for trial in range(12):
        process = start(LIMITED, path)
        assert process.stdout is not None
        written = 0
        if trial % 3:  # else it may not even have been made
            written = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        written = max([written, *map(int, said.split())])
        with ReferenceStore.open(path) as store:
            assert store.problems() == []
            kept = len(store.of(MODEL))
            assert kept >= written and kept % 100 == 0
            assert_whole(store.of(MODEL), range(kept))
            seen.append(kept)
        if trial % 4 == 3:
            path.unlink()
    assert max(seen) > 0


# Size


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [(95, 205), (150, 150)])  # of chosen and rejected, prompts left out
def test_160_000_pairs_of_300_tokens_take_less_than_400_mb(tokens: tuple[int, int], tmp_path: Path) -> None:
    path, pairs = tmp_path / "store.sqlite", 4000
    with ReferenceStore.open(path) as store:
        for first in range(0, 2 * pairs, 16):
            store.of(MODEL).put(dict(row(number, tokens[number % 2]) for number in range(first, first + 16)))
    assert path.stat().st_size / pairs * 160_000 < 270e6
