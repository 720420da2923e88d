# SPDX-License-Identifier: Apache-2.0
"""What the two sides of a connection prove before it counts as open: one vendor, and a handle that opens."""

from __future__ import annotations

from collections.abc import Callable

from sage_kv_connector.backends.pcie import messages as pm
from sage_kv_connector.backends.pcie.ipc_memory import IpcMemory


class Greetings:
    """The dialler greets first; the other side's probe can then be meant for its process."""

    def __init__(self, memory: IpcMemory, tell: Callable[[int, pm.Message], None]) -> None:
        self._memory = memory
        self._tell = tell
        self._dialled: set[int] = set()
        self._greeted: dict[int, pm.Greeting] = {}

    def dialled(self, connection: int) -> None:
        """The inner connection is open, and this side began it. What began it may not have returned yet."""
        self._dialled.add(connection)
        self._greet(connection, b"")

    def answer(self, connection: int, greeting: pm.Greeting) -> bool:
        """The peer's greeting; returns whether this side dialled.

        Raises PcieProtocolError for another vendor, DeviceError or ValueError for a handle that does not open.
        """
        memory = self._memory
        if connection in self._greeted or greeting.vendor != memory.vendor:
            raise pm.PcieProtocolError(
                f"vendor is {greeting.vendor!r}, {memory.vendor!r} here; or greeted twice"
            )
        dialled = connection in self._dialled
        if dialled:
            memory.try_probe(greeting.probe)
        else:
            self._greet(connection, memory.probe(greeting.process))
        self._greeted[connection] = greeting
        return dialled

    def peer_process(self, connection: int) -> int | None:
        """The number by which the peer's runtime knows its process; None before it greeted."""
        greeting = self._greeted.get(connection)
        return None if greeting is None else greeting.process

    def open_process(self, connection: int) -> int:
        """As ``peer_process``. Raises ConnectionError for a connection that is not open."""
        process = self.peer_process(connection)
        if process is None:
            raise ConnectionError(f"connection {connection} is closed")
        return process

    def forget(self, connection: int) -> None:
        self._greeted.pop(connection, None)
        self._dialled.discard(connection)

    def _greet(self, connection: int, probe: bytes) -> None:
        self._tell(connection, pm.Greeting(self._memory.vendor, self._memory.process, probe))
