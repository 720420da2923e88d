# SPDX-License-Identifier: Apache-2.0
"""Transports behind one protocol (``base``). ``BACKENDS`` is the one place that knows ours.

Others ship theirs by an entry point of the group ``sage_kv_connector.backends``: its name is the
backend's, its value ``module:Class``. Ours win over one of the same name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

from sage_kv_connector.backends.base import Backend, BackendOptions, Capabilities, ConnectionInfo

logger = logging.getLogger(__name__)

#: Name → module and class. To add a backend, add its folder and a line.
BACKENDS = {
    "mooncake": "sage_kv_connector.backends.mooncake.backend:MooncakeBackend",
    "nixl": "sage_kv_connector.backends.nixl.backend:NixlBackend",
    "pcie": "sage_kv_connector.backends.pcie.backend:PcieBackend",
    "rdma": "sage_kv_connector.backends.rdma.backend:RdmaBackend",
    "shm": "sage_kv_connector.backends.shm.backend:ShmBackend",
    "tcp": "sage_kv_connector.backends.tcp.backend:TcpBackend",
}
#: Entry points of third parties' backends.
ENTRY_POINTS = "sage_kv_connector.backends"


class BackendClass(Protocol):
    """What a row of ``BACKENDS`` names: a class that makes backends from the options.

    It may have a static ``lacks()``: why this machine can't have it, "" if it can; and a static ``unsuited()``: why
    ``backend=auto`` leaves out one that it can have.
    """

    capabilities: Capabilities

    def from_options(self, options: BackendOptions) -> Backend: ...


@cache
def _homes() -> dict[str, str]:
    """Name → module and class, ours first."""
    shipped = {entry.name: entry.value for entry in entry_points(group=ENTRY_POINTS)}
    return BACKENDS | {name: home for name, home in shipped.items() if name not in BACKENDS}


def backend_names() -> tuple[str, ...]:
    """Every backend that may be asked for; imports none."""
    return tuple(_homes())


def backend_class(name: str) -> BackendClass:
    """Import a backend's module.

    Raises ValueError for a name that nobody ships, and for a third party's that can't be loaded.
    """
    home = _homes().get(name)
    if home is None:
        raise ValueError(
            f"backend {name!r} is not part of this release; allowed: {', '.join(backend_names())}"
        )
    module, _, class_name = home.partition(":")
    try:
        found: BackendClass = getattr(import_module(module), class_name)
        known = found.capabilities
        if not isinstance(known, Capabilities):
            raise TypeError(f"capabilities is {known!r}, must be a class attribute of Capabilities")
    except Exception as error:  # a third party's module may raise anything
        if name in BACKENDS:
            raise
        raise ValueError(
            f"backend {name!r}: the entry point {home!r} of {ENTRY_POINTS} can't be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if known.name != name:
        raise ValueError(f"backend {name!r}: {home!r} says that its name is {known.name!r}")
    return found


def lacks(name: str) -> str:
    """Why this machine can't have a backend, "" if it can. Raises ValueError as ``backend_class``."""
    return _asked(name, "lacks")


def unsuited(name: str) -> str:
    """Why ``backend=auto`` leaves out one that this machine can have, "" if it does not. Raises ValueError as above."""
    return _asked(name, "unsuited")


def _asked(name: str, what: str) -> str:
    ask: Callable[[], str] | None = getattr(backend_class(name), what, None)
    return ask() if ask is not None else ""


def auto_backends() -> tuple[str, ...]:
    """Those that ``backend=auto`` chooses from, the preferred first."""
    return _usable(
        lambda name: unsuited(name) or lacks(name)
    )  # in this order: a library is not loaded for nothing


def ranked_backends() -> tuple[str, ...]:
    """Those that this machine can have, the preferred first."""
    return _usable(lacks)


def _usable(why_not: Callable[[str], str]) -> tuple[str, ...]:
    found: dict[str, int] = {}
    for name in backend_names():
        try:
            why = why_not(name)
        except ValueError as error:
            logger.warning("%s; it is left out", error)
            continue
        if why:
            logger.debug("backend %s is left out: %s", name, why)
        else:
            found[name] = backend_class(name).capabilities.rank
    return tuple(sorted(found, key=lambda name: found[name]))


def host_backends() -> tuple[str, ...]:
    """Those that move host memory for its own sake, the preferred first."""
    return tuple(n for n in ranked_backends() if not backend_class(n).capabilities.device_memory)


def loopback_address(name: str) -> str:
    """What to ``listen`` on for peers on this machine."""
    return f"{name}://127.0.0.1:0" if backend_class(name).capabilities.crosses_nodes else f"{name}://"


def settled_info(backend: Backend, connection: int, timeout_s: float) -> ConnectionInfo:
    """Once there is no better way that may still come, or none came in that time."""
    deadline = time.monotonic() + timeout_s
    while (info := backend.connection_info(connection)).reason:
        if not backend.capabilities.mode_changes or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return info


def create_backend(name: str, options: BackendOptions | None = None) -> Backend:
    """Start a backend; its module is imported only now."""
    return backend_class(name).from_options(options or BackendOptions())
