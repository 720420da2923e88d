# SPDX-License-Identifier: Apache-2.0
"""Host names in peers' addresses, looked up off the control thread.

A resolver may take half a minute to say no. So a lookup has a thread of its own, which dies with the process, and a
time limit; few run at a time, and few more wait. Nothing is remembered: the system's resolver does that.
Control thread only, but for those threads.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections import deque
from collections.abc import Callable

from sage_kv_connector.contract.failure import Code, Reason
from sage_kv_connector.contract.peer import bracket
from sage_kv_connector.engine.control.loop import ControlLoop
from sage_kv_connector.engine.control.timers import Timer

MAX_AT_ONCE = 4
MAX_WAITING = 256

#: Called once with addresses to dial, in the resolver's order, or with why there are none.
OnFound = Callable[[tuple[str, ...] | Reason], None]


def has_name(address: str) -> bool:
    """Whether the host of ``SCHEME://HOST:PORT`` must be looked up."""
    return bool(_host_of(address)) and _number(address) is None


def is_loopback(address: str) -> bool:
    """Whether ``SCHEME://NUMBER:PORT`` is on this machine, whoever wrote it."""
    number = _number(address)
    return number is not None and number.is_loopback


def _number(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(_host_of(address).partition("%")[0])
    except ValueError:
        return None


def _host_of(address: str) -> str:
    return address.partition("://")[2].rpartition(":")[0].removeprefix("[").removesuffix("]")


class _Lookup:
    def __init__(self, address: str, on_found: OnFound) -> None:
        self.address = address
        self.on_found: OnFound | None = on_found
        self.timer: Timer | None = None


class Names:
    """Of one engine."""

    def __init__(self, loop: ControlLoop) -> None:
        self._loop = loop
        self._running = 0
        self._waiting: deque[_Lookup] = deque()

    def look_up(self, address: str, timeout_s: float, on_found: OnFound) -> None:
        lookup = _Lookup(address, on_found)
        late = Reason(Code.UNREACHABLE, f"the name was not resolved within {timeout_s:g} s")
        lookup.timer = self._loop.call_later(timeout_s, self._end, lookup, late)
        if len(self._waiting) >= MAX_WAITING:
            self._end(lookup, Reason(Code.UNREACHABLE, f"{MAX_WAITING} other names wait to be resolved"))
            return
        self._waiting.append(lookup)
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._running < MAX_AT_ONCE:
            lookup = self._waiting.popleft()
            if lookup.on_found is None:
                continue
            self._running += 1
            threading.Thread(target=self._ask, args=(lookup,), name="sage-kvt-names", daemon=True).start()

    def _ask(self, lookup: _Lookup) -> None:
        """On a thread of its own."""
        try:
            found: tuple[str, ...] | Reason = _resolved(lookup.address)
        except (OSError, ValueError) as error:
            found = Reason(Code.UNREACHABLE, str(error))
        self._loop.submit(self._answered, lookup, found)

    def _answered(self, lookup: _Lookup, found: tuple[str, ...] | Reason) -> None:
        self._running -= 1
        self._end(lookup, found)
        self._go_on()

    def _end(self, lookup: _Lookup, found: tuple[str, ...] | Reason) -> None:
        on_found, lookup.on_found = lookup.on_found, None
        if lookup.timer is not None:
            lookup.timer.cancel()
        if on_found is not None:
            on_found(found)


def _resolved(address: str) -> tuple[str, ...]:
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    infos = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(f"{scheme}://{bracket(str(info[4][0]))}:{port}" for info in infos))
