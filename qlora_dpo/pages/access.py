"""Who may see a page: everybody on this machine, and others with a password."""

from __future__ import annotations

import os
from collections.abc import Sequence

from qlora_dpo.errors import UsageError
from qlora_dpo.pages.hosts import LOCAL

AUTH = "QLORA_DPO_APP_AUTH"
SHORTEST_PASSWORD = 8


def credentials(host: str, auth: bool, allowed_hosts: Sequence[str] = ()) -> tuple[str, str] | None:
    """User and password, where they are asked for.

    Raises:
        UsageError: others could reach the page without them, or they are not set.
    """
    if not auth:
        if host not in LOCAL or allowed_hosts:
            reached = f"--host {host}: others can reach that address"
            if host in LOCAL:
                reached = f"--allowed_hosts {' '.join(allowed_hosts)}: others can reach the page by that name"
            raise UsageError(
                f"{reached}, so it needs --auth, with user:password in the environment variable {AUTH}. "
                "Or keep 127.0.0.1 and come by `ssh -L 7860:127.0.0.1:7860 THIS_MACHINE`."
            )
        return None
    user, _, password = os.environ.get(AUTH, "").partition(":")
    if not user or len(password) < SHORTEST_PASSWORD:
        raise UsageError(
            f"--auth: set the environment variable {AUTH} to user:password, with a password of at least "
            f"{SHORTEST_PASSWORD} characters."
        )
    return user, password
