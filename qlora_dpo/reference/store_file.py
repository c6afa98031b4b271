"""The SQLite file under a reference store: made, recognized, opened, and its errors in words."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from qlora_dpo.errors import StorageError

VERSION = 1
APPLICATION = 0x71445052  # "qDPR", in the header of the file; other programs' files have another number
PAGE = 16384  # bytes; a row of a few hundred tokens then wastes next to nothing
PATIENCE = 60.0  # seconds that another process may keep the file locked
_MAGIC, _HEADER = b"SQLite format 3\0", 100

_TABLES = """
CREATE TABLE models (id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL UNIQUE, description TEXT NOT NULL,
    created TEXT NOT NULL);
CREATE TABLE logps (model INTEGER NOT NULL REFERENCES models, key BLOB NOT NULL, tokens INTEGER NOT NULL,
    crc INTEGER NOT NULL, value BLOB NOT NULL);
CREATE UNIQUE INDEX logps_by_key ON logps (model, key);
"""

# File systems that several machines share. A write-ahead log needs memory that all its readers share, so there the
# file has a rollback journal instead, which needs nothing but locks.
_SHARED_FILE_SYSTEMS = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4",
    "smb3", "smbfs",
}  # fmt: skip

_ADVICE = {
    sqlite3.SQLITE_FULL: "the disk is full. Make room there, or name a file elsewhere",
    sqlite3.SQLITE_CORRUPT: "it is damaged or cut short. Restore it, or delete it: its rows are then computed again",
    sqlite3.SQLITE_NOTADB: "it is no reference store, or damaged. Name another file, or delete this one",
    sqlite3.SQLITE_BUSY: f"another process has kept it locked for {PATIENCE:.0f} s. Look which one, or name another",
    sqlite3.SQLITE_PROTOCOL: "its file system has no locks that work. Name a file on a local disk",
    sqlite3.SQLITE_READONLY: "it may not be written. Name a file that you may write to",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened. Name a file in a folder that you may write to",
}  # fmt: skip


def connect(path: Path, read_only: bool) -> sqlite3.Connection:
    """Open a store's file, or make it where it is not only to be read; one that may not be written is only read.

    Raises:
        StorageError: it is no store, damaged, cut short, of another version, or the disk refuses.
    """
    try:
        is_new = _is_new(path)
    except OSError as error:
        raise StorageError(f"the reference store {path} cannot be read: {error.strerror or error}.") from error
    if is_new and read_only:
        raise StorageError(f"{path}: there is no reference store. `reference` and `train` make one.")
    try:
        may_write = not read_only and (is_new or os.access(path, os.W_OK))
        return _open_to_write(path) if may_write else _open_to_read(path)
    except (sqlite3.Error, OSError) as error:
        raise storage_error(path, error) from error


def storage_error(path: Path, error: Exception) -> StorageError:
    """What SQLite or the disk said, with what to do."""
    code = getattr(error, "sqlite_errorcode", None)
    said = getattr(error, "strerror", None) or error
    advice = _ADVICE.get(code & 0xFF) if code is not None else None
    return StorageError(f"the reference store {path} cannot be used ({said})" + (f": {advice}." if advice else "."))


def _is_new(path: Path) -> bool:
    """Whether there is nothing yet; the header is read without SQLite, which would touch other programs' files.

    Raises:
        StorageError: it is something else than a store of this version.
    """
    if not path.exists():
        return True
    if path.is_dir():
        raise StorageError(f"{path} is a folder. Name the file of a reference store, such as {path / 'store.sqlite'}.")
    if not path.is_file():
        raise StorageError(f"{path} is a device. Name the file of a reference store.")
    with path.open("rb") as file:
        header = file.read(_HEADER)
    if not header:
        return True
    if len(header) < _HEADER or not header.startswith(_MAGIC):
        raise StorageError(f"{path} is no reference store, or its beginning is lost. Name another file.")
    version, application = (int.from_bytes(header[start : start + 4], "big") for start in (60, 68))
    if application != APPLICATION:
        raise StorageError(f"{path} is an SQLite file of another program, which is left alone. Name another file.")
    if version != VERSION:
        raise StorageError(
            f"{path} has the form {version} of a reference store, and this version of the tool reads {VERSION}. Name "
            "another file, or bring its rows over: `reference export` with the version that wrote it."
        )
    return False


def _open_to_read(path: Path) -> sqlite3.Connection:
    address = path.resolve().as_uri()
    # Where nothing can be written beside the file, SQLite reads it only if it is told that nobody else writes either.
    is_alone = not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists()
    connection = sqlite3.connect(
        f"{address}?{'immutable=1' if is_alone else 'mode=ro'}", uri=True, timeout=PATIENCE, isolation_level=None,
        check_same_thread=False,
    )  # fmt: skip
    return _checked(connection)


def _open_to_write(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        if not _has_tables(connection):
            _make(connection)
        is_shared = file_system(path) in _SHARED_FILE_SYSTEMS
        _set_journal(connection, "delete" if is_shared else "wal")
        # In a write-ahead log NORMAL loses the last transactions in a power cut, but never the file.
        connection.execute(f"PRAGMA synchronous={'FULL' if is_shared else 'NORMAL'}")
    except BaseException:
        connection.close()
        raise
    return _checked(connection)


def _checked(connection: sqlite3.Connection) -> sqlite3.Connection:
    """The connection once its tables have been found; a file that was cut short fails here."""
    try:
        connection.execute("SELECT count(*) FROM models").fetchone()
        connection.execute("SELECT key FROM logps LIMIT 1").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _has_tables(connection: sqlite3.Connection) -> bool:
    with closing(connection.execute("SELECT name FROM sqlite_master WHERE name = 'logps_by_key'")) as found:
        return found.fetchone() is not None


def _make(connection: sqlite3.Connection) -> None:
    """Make the tables in one transaction, unless another process was faster."""
    connection.execute(f"PRAGMA page_size={PAGE}")
    connection.execute("BEGIN EXCLUSIVE")
    try:
        if not _has_tables(connection):
            for statement in filter(str.strip, _TABLES.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION}")
            connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _set_journal(connection: sqlite3.Connection, mode: str) -> None:
    """Switch the journal to `mode`, or leave it where the file system cannot have it."""
    deadline = time.monotonic() + PATIENCE
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != mode:
        try:
            connection.execute(f"PRAGMA journal_mode={mode}")
            return
        except sqlite3.OperationalError as error:
            # SQLite does not wait here for others that open the file in the same moment.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def file_system(path: Path) -> str:
    """The type of the file system that a path lies on; empty where the system does not say."""
    import psutil

    place = path.resolve()
    mounted = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    return str(max(mounted, key=lambda part: len(part.mountpoint)).fstype) if mounted else ""
