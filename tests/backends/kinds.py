# SPDX-License-Identifier: Apache-2.0
"""Every way to carry bytes that the tests of the contract run over: it comes from ``BACKENDS``.

A backend's own folder beside this module may have a ``kinds.py`` with ``KINDS``: ways to set it up, and what
its peers and its bounds look like. A backend without one is made with its defaults. A third party's is taken in by
its folder here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from sage_kv_connector.backends import BACKENDS, backend_names, create_backend, lacks, loopback_address
from sage_kv_connector.backends.base import Backend, BackendOptions
from sage_kv_connector.backends.protecting_backend import LANE_KEYS_BYTES, ProtectingBackend, TrafficKeys
from tests.backends.places import HOST, Memory


class Stranger(NamedTuple):
    """How a program that is no peer reaches a listener: arguments of ``socket.socket``, and of ``connect``."""

    family: int
    sort: int
    target: Any


@dataclass(frozen=True)
class Kind:
    """One way to carry bytes; ``make`` takes the backend's own keywords on top.

    ``bounds``: options with a value each that is out of range. ``stranger`` makes one of a listener's address;
    without it tests of strangers are left out. ``mode`` and ``crosses_wire`` as
    ``connection_info`` has them, where they are known. ``kernel_answers``: a connection to a stopped process
    is made all the same. ``envelope``: bytes that a control message of that length gets around it. ``forge`` changes
    fields (window, size) of a window's descriptor, as a lying peer would. ``memory``: where windows and posts
    lie; a kind of other than host memory is for the tests marked ``any_memory``. ``quiet_when_closing``:
    nothing lands after ``close_connection`` returned; else after CLOSED. ``encrypts``: its connections are protected,
    encrypted or not; None for those that are not protected.
    """

    name: str
    make: Callable[..., Backend]
    listen_on: str
    mode: str = ""
    lanes: int = 1
    crosses_wire: bool | None = None
    bounds: tuple[tuple[str, int], ...] = ()
    stranger: Callable[[str], Stranger] | None = None
    kernel_answers: bool = False
    envelope: Callable[[int], int] = lambda length: 0
    forge: Callable[..., bytes] | None = None
    memory: Memory = HOST
    quiet_when_closing: bool = True
    encrypts: bool | None = None

    def protect(self, backend: Backend, connection: int, *, connects: bool, last_plain: bytes = b"") -> None:
        """One side of a connection, before ``authorize``; of each kind the same on both sides."""
        if self.encrypts is None:
            return
        assert isinstance(backend, ProtectingBackend)
        keys = [
            np.random.default_rng(seed).bytes(LANE_KEYS_BYTES) for seed in (int(connects), int(not connects))
        ]
        backend.protect(connection, TrafficKeys(self.encrypts, *keys), last_plain)

    def longest_message(self, limit: int) -> int:
        """Bytes of the longest message that the layer above may send where ``limit`` go through below."""
        return max(n for n in range(limit - 64, limit + 1) if n + self.envelope(n) <= limit)


def forge_native(descriptor: bytes, **changes: int) -> bytes:
    """Of the backends that stand on the C++ endpoint."""
    window, generation, size = np.frombuffer(descriptor, np.uint64).tolist()
    fields = {"window": window, "generation": generation, "size": size, **changes}
    return np.array(list(fields.values()), np.uint64).tobytes()


def _with_defaults(name: str, **options: Any) -> Backend:
    return create_backend(name, BackendOptions(chunk_bytes=options.get("chunk_bytes", 0)))


def kinds_of(name: str) -> tuple[Kind, ...]:
    """The kinds of one backend."""
    module = f"tests.backends.{name}.kinds"
    if _has_folder(name) and find_spec(module) is not None:
        kinds: tuple[Kind, ...] = import_module(module).KINDS
        return kinds
    return (Kind(name, partial(_with_defaults, name), loopback_address(name)),)


def _has_folder(name: str) -> bool:
    spec = find_spec(f"tests.backends.{name}") if name.isidentifier() else None
    return spec is not None and spec.submodule_search_locations is not None


#: Folders of what several backends share, with a kind of its own.
SHARED = ("carried",)
KINDS_OF = {
    name: kinds_of(name)
    for name in (*backend_names(), *SHARED)
    if name in SHARED or ((name in BACKENDS or _has_folder(name)) and not lacks(name))
}
KINDS = tuple(kind for kinds in KINDS_OF.values() for kind in kinds)
