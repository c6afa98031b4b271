"""A file of rows that is there whole or as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qlora_dpo.errors import StorageError


@contextmanager
def new_row_file(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write into, which takes the place of `path` when the block ends, or vanishes when it fails.

    Raises:
        StorageError: when the disk refuses.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.unlink(missing_ok=True)  # of a killed process with this id
        with staged.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}; make room there, or name another --output."
        ) from error
    finally:
        staged.unlink(missing_ok=True)
