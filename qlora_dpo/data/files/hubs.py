"""Data sets on Hugging Face's Hub and on ModelScope, and what went wrong where one cannot be had."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_dpo.errors import QloraDpoError, StorageError, UsageError

MODELSCOPE = "modelscope:"
_TRIES = {"MODELSCOPE_DOWNLOAD_MAX_RETRIES": "3", "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "3"}


@dataclass(frozen=True, slots=True)
class _Fault:
    """A way to fail: classes of the errors that say so, phrases of their messages, and what the user is told."""

    classes: tuple[str, ...]
    phrases: tuple[str, ...]
    reason: str
    advice: str


def load_from_hub(source: str, config: str | None, split: str | None, revision: str | None) -> Any:
    """Load a split of a config of a data set on the Hub; `datasets` caches it. The split is by default `train`, or the
    only one.

    Raises:
        StorageError: when the Hub or the data set cannot be had.
        UsageError: when it has no such config or split; the error names those that it has.
    """
    from datasets import Dataset

    try:
        with quiet("huggingface_hub"):
            loaded = _load(source, config, split or "train", revision)
    except QloraDpoError:
        raise
    except Exception as error:  # the library and its transports raise a dozen types
        known = _listed(error) if str(error).startswith(_NO_SPLIT) else []
        if split is None and len(known) == 1 and known != ["train"]:
            return load_from_hub(source, config, known[0], revision)
        raise _hub_error(source, config, split or "train", revision, error) from error
    if not isinstance(loaded, Dataset):
        raise UsageError(f"{source}: --split {split!r} names several splits; name one of {', '.join(loaded)}.")
    return loaded


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Keep to itself what a library says about each of its tries; what came of them is said by us."""
    log = logging.getLogger(library)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _load(source: str, config: str | None, split: str, revision: str | None) -> Any:
    """Load from the Hub, or from the cache alone where the Hub does not answer."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    silence = None if offline else _ask(source, revision)
    try:
        datasets.config.HF_HUB_OFFLINE = offline or silence is not None
        loaded = datasets.load_dataset(source, config, split=split, revision=revision)
    except Exception:
        if silence:
            raise silence from None
        raise
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if offline or silence:
        _check_revision(source, revision, loaded)
    return loaded


def _ask(source: str, revision: str | None) -> Exception | None:
    """Ask the Hub once, where `datasets` would ask for half a minute; returns the error where there is no answer.

    Raises:
        HfHubHTTPError: when the answer is no.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx

    try:
        HfApi().dataset_info(source, revision=revision, timeout=10)
    except httpx.TransportError as error:
        return error
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return error
    return None


def _check_revision(source: str, revision: str | None, loaded: Any) -> None:
    """Refuse what `datasets` took from its cache, where it is of another revision: it takes the newest copy of any.

    Raises:
        StorageError: when it is.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    refs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="dataset"), "refs")
    known = refs / (revision or "main")
    wanted = known.read_text(encoding="utf-8").strip() if known.is_file() else revision
    commits = {Path(file["filename"]).parent.name for file in loaded.cache_files}
    if wanted and commits and commits != {wanted}:
        raise StorageError(
            f"the Hub cannot be asked for {source}, and its newest copy in the cache is not revision "
            f"{revision or 'main'} but commit {commits.pop()}; connect to the network, or give a file."
        )


_NO_SPLIT = "Unknown split"
# How the library's messages begin that list what there is instead, and what the user is told.
_NOT_THERE = {
    _NO_SPLIT: "{source} has no split {split!r}; there is {known}. Name one with --split (train: --dataset_split).",
    "Config name is missing": "{source} has several configs, {known}; name one with --dataset_config, or as "
    "{source}:CONFIG.",
    "BuilderConfig": "{source} has no config {config!r}; there is {known}.",
    "Couldn't find cache": "the Hub does not answer, and of {source} the cache holds no config {config!r}; it holds "
    "{known}.",
}


def _listed(error: Exception) -> list[str]:
    """The names that stand in brackets in a message."""
    found = re.search(r"\[(.*?)\]", str(error), re.DOTALL)
    return re.findall(r"['\"](.*?)['\"]", found[1]) if found else []


def _hub_error(source: str, config: str | None, split: str, revision: str | None, error: Exception) -> QloraDpoError:
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        known = ", ".join(_listed(error))
        for beginning, sentence in _NOT_THERE.items():
            if known and str(error).startswith(beginning):
                return UsageError(sentence.format(source=source, config=config, split=split, known=known))
        named = f"split {split!r}" + (f", revision {revision!r}" if revision else "")
        return UsageError(f"the data set {source} on the Hub cannot be read with {named}: {first_line(error)}")
    fault = _fault(_HUB_FAULTS, error)
    reason = fault.reason.format(reason=first_line(_chain(error)[-1]).rstrip("."), revision=repr(revision))
    return StorageError(f"{source} is neither a local path nor reachable as a Hub id: {reason}; {fault.advice}.")


_TRANSPORT = ("TransportError", "RequestException", "ConnectionError", "TimeoutError", "LocalEntryNotFoundError")
_HUB_FAULTS = (
    _Fault(
        ("GatedRepoError",),
        ("gated dataset",),
        "the data set is gated",
        "accept its terms on its page on the Hub and set HF_TOKEN",
    ),
    _Fault(
        ("RevisionNotFoundError",),
        ("revision '",),
        "the data set has no revision {revision}",
        "check the revision",
    ),
    _Fault(
        ("RepositoryNotFoundError", "DatasetNotFoundError"),
        (),
        "there is no data set of that name, or it is private",
        "check the path or the id's spelling, and set HF_TOKEN if it is private",
    ),
    _Fault(
        ("OfflineModeIsEnabled",),
        ("offlinemodeisenabled",),
        "it is not in the cache, and offline mode is on",
        "check the path, unset HF_HUB_OFFLINE, or give a file",
    ),
    _Fault(
        (),
        ("401 client error", "403 forbidden", "403 client error"),
        "access is denied",
        "set HF_TOKEN to a token that may read it",
    ),
    _Fault(
        (*_TRANSPORT, "HfHubHTTPError"),
        ("consistency check failed",),
        "the connection failed ({reason})",
        "check the path or the network and run the same command again, or give a file",
    ),
    _Fault((), ("",), "{reason}", "check the path or the id's spelling, and set HF_TOKEN if it is private"),
)


def modelscope_folder(source: str, revision: str | None) -> Path:
    """Download the files of `modelscope:ORG/NAME[@revision]` that hold rows; the library caches them.

    Raises:
        StorageError: when ModelScope or the data set cannot be had.
        UsageError: when the package is missing, or the revision is named twice.
    """
    from qlora_dpo.data.files.readers import READERS

    name, _, named = source.removeprefix(MODELSCOPE).partition("@")
    if named and revision:
        raise UsageError(f"{source} names a revision, and revision {revision!r} is given too; leave one of them out.")
    if name.count("/") != 1 or not all(name.split("/")):
        raise UsageError(f"{source}: a data set of ModelScope is named as {MODELSCOPE}ORG/NAME or with @REVISION.")
    for setting, tries in _TRIES.items():  # read on import; the library's own keep a user waiting for half a minute
        os.environ.setdefault(setting, tries)
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError
    except ImportError as error:
        raise UsageError(
            f"{source} needs the package modelscope-hub, which is not installed: pip install modelscope-hub."
        ) from error
    patterns = [f"*{suffix}" for suffix in READERS]
    try:
        with quiet("modelscope_hub"):
            endpoint = HubApi().resolve_endpoint_for_read(name, repo_type="dataset")
            folder = HubApi(endpoint=endpoint).download_repo(
                name, "dataset", revision=named or revision, allow_patterns=patterns
            )
        return Path(folder)
    except (HubError, OSError) as error:
        raise _modelscope_error(source, named or revision, error) from error


def _modelscope_error(source: str, revision: str | None, error: Exception) -> StorageError:
    fault = _fault(_MODELSCOPE_FAULTS, error)
    asked = f" with revision {revision!r}" if revision else ""
    reason = fault.reason.format(reason=first_line(_chain(error)[-1]).rstrip("."))
    return StorageError(f"{source} cannot be had from ModelScope{asked}: {reason}; {fault.advice}.")


_MODELSCOPE_FAULTS = (
    _Fault(
        ("NotExistError",),
        (),
        "there is no data set of that name and revision, or it is private",
        "check the spelling, and set MODELSCOPE_API_TOKEN if it is private",
    ),
    _Fault(
        ("AuthenticationError", "PermissionDeniedError"),
        (),
        "access is denied",
        "accept its terms on its page and set MODELSCOPE_API_TOKEN to a token that may read it",
    ),
    _Fault(
        (*_TRANSPORT, "NetworkError", "ServerError", "FileDownloadError", "FileIntegrityError"),
        (),
        "the connection failed ({reason})",
        "check the network and run the same command again",
    ),
    _Fault((), ("",), "{reason}", "check the spelling"),
)


def _fault(faults: Sequence[_Fault], error: BaseException) -> _Fault:
    """The first fault that an error, or what led to it, shows."""
    names: set[str] = set()
    messages = ""
    for cause in _chain(error):
        names |= {kind.__name__ for kind in type(cause).__mro__}
        messages += f"{cause}\n".lower()
    return next(
        fault for fault in faults if names & set(fault.classes) or any(phrase in messages for phrase in fault.phrases)
    )


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what led to it, one after the other."""
    chain = [error]
    while cause := chain[-1].__cause__ or (None if chain[-1].__suppress_context__ else chain[-1].__context__):
        chain.append(cause)
    return chain


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
