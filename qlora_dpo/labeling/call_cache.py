"""Every reply of a served model, kept by the content of its request, so that no call is paid twice."""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from qlora_dpo.endpoint import Endpoint, Reply
from qlora_dpo.errors import StorageError

_MAGIC = b"SQLite format 3\0"
_TABLES = """
CREATE TABLE IF NOT EXISTS secret (value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS calls (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL);
"""


class CallCache:
    """One SQLite file; a reply that was put there survives a kill.

    Raises:
        StorageError: it cannot be opened, read or written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        if file.exists() and (not file.is_file() or (file.stat().st_size and not is_call_cache(file))):
            raise StorageError(
                f"the file of calls {file} is something else, which is left alone. Name another with --cache, or move "
                "it away."
            )
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(file, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the last calls, a kill none
            self._database.executescript(_TABLES)
            self._database.execute(
                "INSERT INTO secret SELECT ? WHERE NOT EXISTS (SELECT * FROM secret)", (secrets.token_hex(32),)
            )
            self.secret: str = self._database.execute("SELECT value FROM secret").fetchone()[0]
        except (sqlite3.Error, OSError) as error:
            raise self._error(error) from error

    def get(self, key: str) -> Reply | None:
        """The reply to a request."""
        try:
            row = self._database.execute(
                "SELECT text, finish_reason, input_tokens, output_tokens FROM calls WHERE key = ?", (key,)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._error(error) from error
        return Reply(*row) if row else None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        row = (key, reply.text, reply.finish_reason, reply.input_tokens, reply.output_tokens)
        try:
            self._database.execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def _error(self, error: Exception) -> StorageError:
        return StorageError(
            f"the file of calls {self.file} cannot be used: {error}. Name another with --cache, or move it away."
        )


class CachedChat:
    """A served model whose replies are kept; counts what was asked and what it cost."""

    def __init__(
        self,
        endpoint: Endpoint,
        cache: CallCache,
        price_per_million_input: float | None = None,
        price_per_million_output: float | None = None,
    ) -> None:
        self.endpoint, self.cache = endpoint, cache
        self._prices = price_per_million_input, price_per_million_output
        self.asked = self.from_cache = self.input_tokens = self.output_tokens = 0

    async def __call__(self, messages: Sequence[Any], **options: Any) -> Reply:
        """As `Endpoint.chat`."""
        content = json.dumps([self.endpoint.model, list(messages), options], sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        known = self.cache.get(key)
        if known is not None:
            self.from_cache += 1
            return known
        reply = await self.endpoint.chat(messages, **options)
        self.cache.put(key, reply)
        self.asked += 1
        self.input_tokens += reply.input_tokens
        self.output_tokens += reply.output_tokens
        return reply

    def summary(self) -> str:
        """Calls, tokens and money of this run, as a line to print."""
        tokens = (self.input_tokens, self.output_tokens)
        counted = f"{tokens[0]:,} tokens in, {tokens[1]:,} out" if any(tokens) or not self.asked else "tokens not told"
        line = f"calls: {self.asked:,} asked, {self.from_cache:,} from {self.cache.file} for free; {counted}"
        if self._prices == (None, None):
            return line
        cost = sum(count * (price or 0) for count, price in zip(tokens, self._prices, strict=True)) / 1e6
        return f"{line}, cost {cost:.4f}"


def is_call_cache(file: Path) -> bool:
    """Whether a file holds calls: an SQLite file with no other tables. It is read only, and nothing is made beside
    it."""
    try:
        with file.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                return False
        with closing(sqlite3.connect(f"{file.resolve().as_uri()}?immutable=1", uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    except (OSError, sqlite3.Error):
        return False
    return tables <= {"secret", "calls"}  # none, where a kill left them in the log beside it


def calls_path(output: Path) -> Path:
    """pairs.jsonl has the calls made for it in pairs.calls.sqlite."""
    return output.with_name(f"{output.name.removesuffix('.jsonl')}.calls.sqlite")
