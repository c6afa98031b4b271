"""A file is there whole, as it was or as it becomes: written beside its place, synced, and renamed."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

PNG_MARK = b"Software\0qlora_dpo"


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a kill, sees the old or the new content, never half of it.

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.unlink(missing_ok=True)  # of a killed process with this id
        with staged.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def save_picture(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure of matplotlib as a PNG that says which program drew it (`PNG_MARK`).

    Raises:
        OSError: the disk refuses; the file is as it was.
    """
    content = BytesIO()
    figure.savefig(content, dpi=dpi, format="png", metadata={"Software": "qlora_dpo"})
    write_whole(path, content.getvalue())
