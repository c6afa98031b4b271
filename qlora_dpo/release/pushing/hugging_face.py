"""Uploads to Hugging Face's Hub (or what HF_ENDPOINT names) by huggingface_hub: all files in one commit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qlora_dpo.data.files.hubs import first_line, quiet
from qlora_dpo.errors import QloraDpoError, StorageError, UsageError
from qlora_dpo.release.pushing.uploading import RETRIED, Upload, says_if_stopped, tried

_ASKED_SECONDS = 10.0
_BY_STATUS = {
    401: "the token is not accepted: it is mistyped, expired or revoked. Log in again (`hf auth login`), or set "
    "HF_TOKEN to a new token that may write",
    402: "the account does not pay for that (a private repository this large, perhaps). See its billing page",
    403: "the token may not write there. Give it write permission on the Hub, or name a repository of your own",
    404: "there is no such user or organization, or the token may not see it. Check --repo and the token",
    409: "somebody else created or changed it at the same moment. Run the same command again",
    412: "somebody else committed at the same moment. Run the same command again",
    413: "a file is larger than the Hub takes. Write smaller ones with --max_shard_size",
    429: "it has had too many requests from you. Wait some minutes and run the same command again",
}


def push_to_hugging_face(upload: Upload) -> str:
    """Create the repository where there is none and commit all files to it; returns the commit's address.

    Raises:
        UsageError: nobody is logged in, the repository is public, or the card is refused.
        StorageError: the Hub refuses or cannot be reached, or a file changed meanwhile.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UsageError(
            "nobody is logged in to the Hub, so nothing can be pushed. Log in with `hf auth login`, or set HF_TOKEN to "
            "a token that may write."
        )
    api = HfApi()
    with quiet("huggingface_hub"), _errors(upload), says_if_stopped(upload):
        before = _repository(api, upload)
        additions = [CommitOperationAdd(file.name, file.content) for file in upload.files]
        # The large files first: while they are on their way nothing of this push can be seen.
        tried(lambda: api.preupload_lfs_files(upload.repository, additions, free_memory=False), _wait_after)
        upload.check_unchanged()
        commit = tried(lambda: _commit(api, upload, additions), _wait_after)
        _check_arrival(api, upload, commit.oid)
    sent = {file.name for file in upload.files} | {".gitattributes"}
    if older := sorted(file.rfilename for file in before.siblings or () if file.rfilename not in sent):
        print(f"Of earlier pushes these stay in {upload.repository}: {', '.join(older)}.")
    if commit.oid == before.sha:
        print(f"{upload.repository} had all of this already, so there is no new commit.")
    return str(commit.commit_url)


def _repository(api: Any, upload: Upload) -> Any:
    """What the Hub says about the repository, which is created where it is not there."""
    from huggingface_hub.errors import RepositoryNotFoundError

    name = upload.repository
    try:
        info = tried(lambda: api.model_info(name), _wait_after)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:  # the Hub says so to a token that it does not know
            api.whoami()
        tried(lambda: api.create_repo(name, private=not upload.is_public, exist_ok=True), _wait_after)
        info = tried(lambda: api.model_info(name), _wait_after)
    if not info.private and not upload.is_public:
        upload.refuse_public()
    if info.private and upload.is_public:
        print(f"{name} is private and stays so: make it public on its page.")
    return info


def _commit(api: Any, upload: Upload, additions: list[Any]) -> Any:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        commit = api.create_commit(upload.repository, additions, commit_message=upload.message)
    for warning in said:
        print(f"The Hub says: {' '.join(str(warning.message).split())}")
    return commit


def _check_arrival(api: Any, upload: Upload, commit: str) -> None:
    """Raises StorageError where a file is not in the commit, because a .gitignore there names it, say."""
    names = [file.name for file in upload.files]
    there = {
        found.path: found.size
        for found in tried(lambda: api.get_paths_info(upload.repository, names, revision=commit), _wait_after)
    }
    missing = [file.name for file in upload.files if there.get(file.name) != file.size]
    if missing:
        raise StorageError(
            f"{upload.repository} has the commit {commit}, but without {', '.join(missing)} as it is here. See whether "
            "a .gitignore there names it, and run the same command again."
        )


def _wait_after(error: Exception) -> float | None:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in RETRIED:
            return None
        asked = error.response.headers.get("Retry-After", "0")
        return float(asked) if asked.isdigit() else 0.0
    # A server in trouble also answers with a page where the library expects JSON.
    return 0.0 if isinstance(error, httpx.TransportError | json.JSONDecodeError) else None


@contextmanager
def _errors(upload: Upload) -> Iterator[None]:
    """One sentence for whatever goes wrong."""
    try:
        yield
    except QloraDpoError:
        raise
    except Exception as error:  # the library and its transports raise a dozen types
        raise _error(upload, error) from error


def _error(upload: Upload, error: Exception) -> QloraDpoError:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    start = f"nothing was committed to {upload.repository}: "
    if "README.md" in str(error) and isinstance(error, ValueError):
        return UsageError(f"{start}{' '.join(str(error).split())}. Correct the card and run the same command again.")
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return UsageError(f"{start}offline mode is on. Unset HF_HUB_OFFLINE.")
    refused = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if refused is not None:
        status = refused.response.status_code
        words = " ".join(str(refused).split())[:300].rstrip(".")
        usual = f"the Hub answers {status}: {words}. Run the same command again later"
        return StorageError(f"{start}{_BY_STATUS.get(status, usual)}.")
    if any(isinstance(cause, httpx.TransportError) for cause in causes):
        return StorageError(
            f"{start}the Hub cannot be reached ({first_line(causes[-1]).rstrip('.')}). Check the network, or set "
            "HF_ENDPOINT to a mirror, and run the same command again."
        )
    reason = " ".join(str(error).split()) or type(error).__name__
    return StorageError(f"{start}{reason.rstrip('.')}. Run the same command again.")


def license_on_hub(base: str) -> tuple[Mapping[str, str], str | None]:
    """(license metadata of a model on the Hub, why there is none)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        card = HfApi().model_info(base, timeout=_ASKED_SECONDS).card_data
    except RepositoryNotFoundError:
        return {}, f"the Hub knows no {base}, or keeps it private, so the card names no license: name it with --license"
    except Exception as error:  # no network, no answer, offline mode: the card is written without
        why = first_line(error).rstrip(".")
        return {}, f"the license of {base} cannot be asked for ({why}): name it with --license"
    found = {name: card.get(name) for name in ("license", "license_name", "license_link")} if card else {}
    known = {name: str(value) for name, value in found.items() if value}
    return known, None if known else f"{base} names no license on its card: name it with --license"
