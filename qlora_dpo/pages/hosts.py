"""Which names a page answers to: a website that points its own name at this machine (DNS rebinding) reaches nothing."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

LOCAL = ("localhost", "127.0.0.1", "::1")
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d{1,5})?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Hosts:
    """The names that the `Host` of a request may have, with any port."""

    names: frozenset[str]
    named: frozenset[str] = frozenset()
    """Those of `--allowed_hosts`, at which a proxy answers: it may pass on another `Host` than the browser's."""
    any_address: bool = False
    """Numeric addresses too: no website can have one for its own."""

    @classmethod
    def of(cls, host: str, named: Iterable[str] = ()) -> Hosts:
        """Of an address that is bound: a local one answers to itself, a public one also to the machine's name."""
        named = frozenset(name.lower() for name in named)
        if host in LOCAL:
            return cls(frozenset(LOCAL) | named, named)
        return cls(frozenset({*LOCAL, host.lower(), socket.gethostname().lower()}) | named, named, any_address=True)

    def allow(self, authority: str) -> bool:
        """Whether `name` or `name:port` may be asked for."""
        name = name_of(authority)
        return name in self.names or (self.any_address and _is_address(name))

    def __str__(self) -> str:
        """What is allowed, in words."""
        return ", ".join([*sorted(self.names), *(["any numeric address"] if self.any_address else [])])


def name_of(authority: str) -> str:
    """The name without the port, in small letters, without brackets; empty where it is none."""
    found = _AUTHORITY.fullmatch(authority)
    return (found[1] or found[2]).lower() if found else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
