# SPDX-License-Identifier: Apache-2.0
"""The connection below a handshake, as one side sees it: how it is to be protected, and where its two ends are."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import NamedTuple

from sage_kv_connector.backends.base import Capabilities, ConnectionInfo


class Carrier(NamedTuple):
    """``security``: "none", "authenticated" or "encrypted". ``address``: what the connector dialled; at the acceptor
    those under which it is known, its own choice first, separated by ", ". ``peer``: where the connector came from, as
    the acceptor sees it.

    Addresses are empty where a connection can't leave the node.
    """

    security: str = "none"
    address: str = ""
    peer: str = ""

    def is_known_as(self, dialled: str) -> bool:
        """Whether who dialled this address means the engine here. A relay between is dialled at another one.

        Of an advertised host name only the port is compared: what it stands for differs from place to place.
        """
        wanted = _place(dialled)
        for known in self.address.split(", "):
            host, port = _place(known)
            named = isinstance(host, str) and host != ""
            if (host, port) == wanted or (named and port == wanted[1]):
                return True
        return False


def carrier_dialled(security: str, capabilities: Capabilities, address: str) -> Carrier:
    """Of a connection that this side made."""
    return Carrier(security, address) if capabilities.crosses_nodes else Carrier()


def carrier_accepted(
    security: str, capabilities: Capabilities, info: ConnectionInfo, advertised: Iterable[str]
) -> Carrier:
    """Of a connection that came in. ``advertised``: the engine's addresses, of all backends."""
    if not capabilities.crosses_nodes:
        return Carrier()
    name = capabilities.name
    known = [address for address in advertised if address.startswith(f"{name}://")]
    own = f"{name}://{info.local}"
    return Carrier(
        security, ", ".join([*known, *([own] if own not in known else [])]), f"{name}://{info.peer}"
    )


def _place(address: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address | str, str]:
    """Host and port that can be compared: of a number however it is written, of its scope nothing."""
    host, _, port = address.partition("://")[2].rpartition(":")
    host = host.removeprefix("[").removesuffix("]").partition("%")[0]
    try:
        number = ipaddress.ip_address(host)
    except ValueError:
        return host, port
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return mapped or number, port
