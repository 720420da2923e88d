# SPDX-License-Identifier: Apache-2.0
"""Where an engine listens, and under which address its peers reach it."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterable

from sage_kv_connector.backends.base import Backend
from sage_kv_connector.config import SECRET_ENV, KVTransportConfig
from sage_kv_connector.contract.peer import bracket, is_loopback

#: ``ioctl(2)``: an interface's address (netdevice(7)).
SIOCGIFADDR = 0x8915
#: Hosts that stand for all interfaces.
ANY = ("0.0.0.0", "::")


def listen_host(config: KVTransportConfig, secret: bytes) -> str:
    if config.host == "auto":
        return "0.0.0.0" if secret else "127.0.0.1"
    if not secret and not is_loopback(config.host):
        raise ValueError(
            f"host {config.host!r} is reachable from other machines, so a shared secret is needed: "
            f"set secret, secret_file or ${SECRET_ENV} on every server (or host=127.0.0.1)"
        )
    return config.host


def _reachable_host(host: str) -> str:
    """The address to advertise for a wildcard: that of the interface with the default route."""
    if host not in ANY:
        return host
    family, probe = (socket.AF_INET, "192.0.2.1") if host == "0.0.0.0" else (socket.AF_INET6, "2001:db8::1")
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((probe, 9))  # a datagram socket sends nothing: this only looks up the route
            return str(sock.getsockname()[0])
        except OSError as error:
            raise ValueError(
                f"advertise_host is not set, and this machine has no default route that would tell it ({error}): set "
                "it to the address at which peers reach this machine, or host=127.0.0.1 for peers on this one"
            ) from error


def link_addresses(config: KVTransportConfig) -> tuple[str, ...]:
    """Of ``links``, each as an address. Raises ValueError for one that this host has not, or that needs a secret."""
    found = tuple(map(_own_address, config.links))
    if not config.resolved_secret() and (open_ones := [one for one in found if not is_loopback(one)]):
        raise ValueError(
            f"links {', '.join(open_ones)} are reachable from other machines, so a shared secret is needed: set "
            f"secret, secret_file or ${SECRET_ENV} on every server"
        )
    return found


def _own_address(link: str) -> str:
    """An interface's first IPv4 address, or the address itself if this host has it."""
    with socket.socket(socket.AF_INET6 if ":" in link else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            if any(name == link for _, name in socket.if_nameindex()):
                asked = struct.pack("256s", link.encode())
                return socket.inet_ntoa(fcntl.ioctl(sock.fileno(), SIOCGIFADDR, asked)[20:24])
            sock.bind((link, 0))
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ValueError(
                f"links has {link!r}, which is no address of this host ({error}); allowed: interfaces with an IPv4 "
                f"address among {names}, or addresses that they have"
            ) from error
    return link


def advertised_host(config: KVTransportConfig) -> str:
    """Where peers reach this node. Raises ValueError as ``listen_host``, and where nothing but an option could tell."""
    if config.advertise_host is None and config.host == "auto" and config.links:
        return link_addresses(config)[0]
    return config.advertise_host or _reachable_host(listen_host(config, config.resolved_secret()))


def listen_on(
    backends: Iterable[Backend], host: str, config: KVTransportConfig, rank: int
) -> tuple[str, ...]:
    """Let the backends of this rank listen on ``host``; returns what peers dial. Raises OSError as they do."""
    return tuple(address for backend in backends for address in _listen_on(backend, host, config, rank))


def _listen_on(backend: Backend, host: str, config: KVTransportConfig, rank: int) -> Iterable[str]:
    """Where it listens on all interfaces, a peer may begin over any of ``links``."""
    name = backend.capabilities.name
    if not backend.capabilities.crosses_nodes:
        return (backend.listen(f"{name}://"),)
    port = config.port + rank if config.port else 0
    bound = backend.listen(f"{name}://{bracket(host)}:{port}").rpartition(":")[2]
    if config.advertise_port is not None:
        bound = str(config.advertise_port + rank)
    reached = dict.fromkeys((advertised_host(config), *(link_addresses(config) if host in ANY else ())))
    return [f"{name}://{bracket(host)}:{bound}" for host in reached]
