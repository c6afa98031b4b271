"""What both hubs share: what is to be uploaded, and trying again what may go well the next time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.release.pushing.files import Sent

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds between tries
LONGEST_WAIT = 60.0  # that a server may ask for
RETRIED = {408, 429, 500, 502, 503, 504}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Upload:
    """What goes where."""

    repository: str
    files: Sequence[Sent]
    is_public: bool
    message: str
    license: str | None

    def check_unchanged(self) -> None:
        """Raises StorageError where a file is another one than was looked through."""
        changed = [file.name for file in self.files if file.has_changed()]
        if changed:
            raise StorageError(
                f"{', '.join(changed)} changed while it was uploaded, so nothing was committed to {self.repository}. "
                "Run the same command again when nothing writes into the folder."
            )

    def refuse_public(self) -> None:
        """Raises UsageError: the repository is there, everybody can read it, and nobody asked for that."""
        raise UsageError(
            f"{self.repository} exists and is public, and what is pushed there everybody can read. Add --public if "
            "that is meant, make it private on its page, or name another --repo."
        )


def tried(call: Callable[[], Result], wait_after: Callable[[Exception], float | None]) -> Result:
    """The result of `call`, tried again after errors for which `wait_after` gives the seconds to wait at least."""
    for usual in WAITS:
        try:
            return call()
        except Exception as error:
            asked = wait_after(error)
            if asked is None:
                raise
            time.sleep(min(LONGEST_WAIT, max(usual, asked)))
    return call()


@contextmanager
def says_if_stopped(upload: Upload) -> Iterator[None]:
    """A signal in this block says what became of the upload."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            print(
                f"Nothing was committed to {upload.repository}; files that had arrived are not sent again next time.",
                file=sys.stderr,
            )
        raise
