"""Uploads to ModelScope by its package modelscope-hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from qlora_dpo.data.files.hubs import first_line, quiet
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.release.pushing.uploading import Upload, says_if_stopped

_REASONS = (
    ("AuthenticationError", "the token is not accepted. Set MODELSCOPE_API_TOKEN to a valid one"),
    ("PermissionDeniedError", "the token may not write there. Name a repository of your own"),
    ("NotExistError", "there is no such user or organization. Check --repo"),
    ("QuotaExceededError", "the account's quota is used up"),
    ("RateLimitError", "it has had too many requests from you. Wait some minutes and run the same command again"),
)


def push_to_modelscope(upload: Upload) -> str:
    """Create the repository where there is none and upload all files to it; returns its address.

    Raises:
        UsageError: the package is missing, nobody is logged in, or the repository is public.
        StorageError: ModelScope refuses or cannot be reached, or a file changed meanwhile.
    """
    try:
        from modelscope_hub import HubApi
        from modelscope_hub.errors import HubError
    except ImportError as error:
        raise UsageError(
            "--hub modelscope needs the package modelscope-hub, which is not installed: pip install modelscope-hub."
        ) from error
    api = HubApi()
    if not api._config.token:
        raise UsageError(
            "nobody is logged in to ModelScope, so nothing can be pushed. Set MODELSCOPE_API_TOKEN to your token."
        )
    try:
        with (
            quiet("modelscope_hub"),
            says_if_stopped(upload),
            tempfile.TemporaryDirectory(prefix="qlora_dpo-push-") as folder,
        ):
            _prepare_repository(api, upload)
            lay_out(upload, Path(folder))
            upload.check_unchanged()
            api.upload_folder(upload.repository, "model", folder, commit_message=upload.message, use_cache=False)
            upload.check_unchanged()
    except (HubError, OSError) as error:
        raise _error(upload, error) from error
    return f"{str(api._config.endpoint).rstrip('/')}/models/{upload.repository}"


def lay_out(upload: Upload, folder: Path) -> None:
    """The files as they are to be uploaded, the large ones as links."""
    for file in upload.files:
        place = folder / file.name
        place.parent.mkdir(exist_ok=True)
        if isinstance(file.content, Path):
            place.symlink_to(file.content.resolve())
        else:
            place.write_bytes(file.content)


def _prepare_repository(api: Any, upload: Upload) -> None:
    name = upload.repository
    if not api.repo_exists(name, "model"):
        visibility = "public" if upload.is_public else "private"
        # Without a license the package would write Apache-2.0.
        api.create_repo(name, "model", visibility=visibility, license=upload.license or "other")
    is_private = getattr(api.get_repo(name, "model").visibility, "label", None) == "private"
    if not is_private and not upload.is_public:
        upload.refuse_public()


def _error(upload: Upload, error: Exception) -> StorageError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    usual = f"{first_line(error).rstrip('.')}. Run the same command again"
    reason = next((reason for name, reason in _REASONS if name in kinds), usual)
    return StorageError(f"the push to {upload.repository} on ModelScope failed: {reason}.")
