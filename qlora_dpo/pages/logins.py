"""How often a password may be guessed: a few times at once, then with a delay that doubles."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

FORGOTTEN = 3600.0  # seconds after the last attempt
MOST_CLIENTS = 1024  # that are remembered

Value = TypeVar("Value")


@dataclass
class Attempts:
    """The wrong attempts of one client, or of all."""

    free: int
    """So many cost nothing."""
    longest: float
    """The delay doubles from one second to this."""
    wrong: int = 0
    last: float = 0.0

    def left(self, now: float) -> float:
        """Seconds until the next attempt may be made."""
        if now - self.last >= FORGOTTEN:
            self.wrong = 0
        if self.wrong < self.free:
            return 0.0
        return max(0.0, self.last + min(self.longest, 2.0 ** min(self.wrong - self.free, 32)) - now)

    def count(self, now: float) -> None:
        """One more."""
        self.wrong, self.last = self.wrong + 1, now


class Logins:
    """Slows down guessing, from one address and from many; a client that has logged in waits for nobody else's guesses.

    An attempt counts as wrong from its beginning, so that many at once are no way around it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all = Attempts(free=50, longest=60.0)
        self._clients: OrderedDict[str, Attempts] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds that a client has to wait; 0 lets it try, and counts the attempt."""
        now, client = self._clock(), _client(address)
        own = _remember(self._clients, client, self._clients.get(client) or Attempts(free=5, longest=300.0))
        concerned = [own] if client in self._known else [own, self._all]
        seconds = max(attempts.left(now) for attempts in concerned)
        if seconds == 0:
            for attempts in concerned:
                attempts.count(now)
        return seconds

    def succeeded(self, address: str) -> None:
        """The password was right: what came before no longer counts."""
        client = _client(address)
        self._clients.pop(client, None)
        self._all.wrong = 0
        _remember(self._known, client, None)


def _client(address: str) -> str:
    """Who counts as one: an IPv4 address, or the network of an IPv6 address, which is what one customer gets."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    return str(found) if found.version == 4 else str(ipaddress.ip_network((found, 64), strict=False))


def _remember(known: OrderedDict[str, Value], client: str, value: Value) -> Value:
    known[client] = value
    known.move_to_end(client)
    if len(known) > MOST_CLIENTS:
        known.popitem(last=False)
    return value
