# SPDX-License-Identifier: Apache-2.0
"""Mooncake's transfer engine by its Python API (0.3.13): peers find each other by HOST:PORT, no other server."""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from importlib.util import find_spec

from sage_kv_connector.backends.carried.library import LibraryError, LibrarySettings, Rows, rdma_devices

#: It refuses a batch of 4,096 descriptors (seen with 0.3.13).
MOST_IN_BATCH = 1024
#: How engines find each other: one asks the other, at its address.
HANDSHAKE = "P2PHANDSHAKE"
#: Without a host that is known, for peers on this machine.
LOOPBACK = "127.0.0.1"
ADDRESS = re.compile(r"[A-Za-z0-9.:\[\]_-]{1,200}:[0-9]{1,5}")


class MooncakeLibrary:
    """``settings.transport`` is one of the engine's protocols (tcp, rdma, ascend, …), ``device`` its network cards.

    The API can only wait for a batch, so ``begin`` does.
    """

    def __init__(self, settings: LibrarySettings) -> None:
        module = import_module("mooncake.engine")
        protocol = settings.transport or ("rdma" if rdma_devices() else "tcp")
        host = settings.host or LOOPBACK
        self._engine = module.TransferEngine()
        if self._engine.initialize(host, HANDSHAKE, protocol, settings.device) != 0:
            raise LibraryError(
                f"Mooncake's engine does not start (library_transport={protocol}, "
                f"library_device={settings.device or 'any'}, host {host})"
            )
        self._address = f"{host}:{self._engine.get_rpc_port()}"
        self._peers: dict[int, str] = {}

    @staticmethod
    @cache
    def lacks() -> str:
        try:
            found = find_spec("mooncake.engine") is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return "Mooncake is not installed (pip install mooncake-transfer-engine)"
        try:
            import_module("mooncake.engine")
        except ImportError as error:  # a library of the system that it needs
            return f"Mooncake can't be loaded: {error}"
        return ""

    def register(self, address: int, length: int) -> None:
        if self._engine.register_memory(address, length) != 0:
            raise LibraryError(f"Mooncake can't register {length} bytes")

    def deregister(self, address: int, length: int) -> None:
        self._engine.unregister_memory(address)

    def description(self) -> bytes:
        return self._address.encode()

    def meet(self, connection: int, description: bytes) -> None:
        address = description.decode("ascii", "replace")
        if not ADDRESS.fullmatch(address):
            raise LibraryError(f"the peer's engine is at {address[:64]!r}, must be HOST:PORT")
        if self._engine.get_first_buffer_address(address) == 0:
            raise LibraryError(f"Mooncake can't reach the peer's engine at {address}")
        self._peers[connection] = address

    def forget(self, connection: int) -> None:
        self._peers.pop(connection, None)

    def begin(self, connection: int, rows: Rows) -> object:
        address = self._peers.get(connection)
        if address is None:
            raise LibraryError("the peer's engine is not known")
        for first in range(0, len(rows), MOST_IN_BATCH):
            here, there, lengths = rows[first : first + MOST_IN_BATCH].T.tolist()
            if self._engine.batch_transfer_sync_read(address, here, there, lengths) != 0:
                raise LibraryError(f"Mooncake's read from {address} failed")
        return None

    def has_ended(self, read: object) -> bool:
        return True

    def close(self) -> None:
        self._peers.clear()
        del self._engine
