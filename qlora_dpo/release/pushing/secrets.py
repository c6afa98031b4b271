"""Looks for secrets, and for traces of a person's machine, in all that is about to leave it."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlora_dpo.errors import StorageError
from qlora_dpo.redaction import secrets_in

LARGEST_HEAD = 32 << 20  # of a file of weights: its metadata stand before the tensors
# Vocabularies hold all kinds of words, so only what has the shape of a secret is looked for in them.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model", "*.gguf")
_OTHER_HOME = re.compile(r"(?<![\w.])(?:/home|/Users|[A-Za-z]:\\+Users)[/\\]+[\w.-]+[/\\]")
_MACHINE_NAME = re.compile(r"(?=.*[\d.-])[\w.-]{5,}")  # `model` or `gpu` would be found in innocent words


@dataclass(frozen=True)
class Finding:
    """A place in a file, and what is there; never the text itself."""

    file: str
    line: int | None
    """None in a file that is not text."""
    kind: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.kind}"


def scan(name: str, content: bytes) -> list[Finding]:
    """All findings in a file's content, the first of each kind on each line."""
    is_text = b"\0" not in content
    text = content.decode("utf-8" if is_text else "latin-1", errors="replace")
    places = secrets_in(text)
    if not any(Path(name).match(pattern) for pattern in VOCABULARIES):
        places += list(_traces(text))
    found = [Finding(name, text.count("\n", 0, place) + 1 if is_text else None, kind) for place, kind in sorted(places)]
    return list(dict.fromkeys(found))


def head_of(path: Path) -> bytes:
    """The part of a file of weights that can hold text.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if path.suffix != ".safetensors":
                return file.read(LARGEST_HEAD)
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, LARGEST_HEAD))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        metadata = json.loads(header).get("__metadata__") or {}
    except (ValueError, AttributeError) as error:
        raise StorageError(f"{path} is no safetensors file: its header cannot be read. Write it again.") from error
    return json.dumps(metadata, ensure_ascii=False).encode()


def _traces(text: str) -> Iterator[tuple[int, str]]:
    """(place, what it is) of paths in a home directory, and of this machine's name."""
    home, host = str(Path.home()).rstrip("/"), socket.gethostname()
    if home:
        own = re.compile(rf"(?<![\w.]){re.escape(home)}(?=[/\\])")
        yield from ((match.start(), "a path in your home directory") for match in own.finditer(text))
    yield from ((match.start(), "a path in a home directory") for match in _OTHER_HOME.finditer(text))
    if _MACHINE_NAME.fullmatch(host) and host != "localhost":
        own = re.compile(rf"(?<![\w.-]){re.escape(host)}(?![\w.-])")
        yield from ((match.start(), "the name of this machine") for match in own.finditer(text))
