# SPDX-License-Identifier: Apache-2.0
"""A library that reads other processes of this machine, so that tests need no other one."""

from __future__ import annotations

import ctypes
import json
import os
from typing import ClassVar

from sage_kv_connector.backends.base import Capabilities
from sage_kv_connector.backends.carried.backend import CarriedBackend
from sage_kv_connector.backends.carried.library import LibraryClass, LibraryError, LibrarySettings, Rows


class ThisMachine:
    """``refuses`` and ``fails`` are set by tests; ``slow``: so many looks until a read ended."""

    def __init__(self, settings: LibrarySettings) -> None:
        self.settings = settings
        self.registered: list[tuple[int, int]] = []
        self.met: dict[int, tuple[int, list[list[int]]]] = {}
        self.reads = 0
        self.refuses = self.fails = self.closed = False
        self.slow = 2
        self.most_bytes = 1 << 40

    @staticmethod
    def lacks() -> str:
        return ""

    def register(self, address: int, length: int) -> None:
        if length > self.most_bytes:
            raise LibraryError(f"{length} bytes are too many")
        self.registered.append((address, length))

    def deregister(self, address: int, length: int) -> None:
        self.registered.remove((address, length))

    def description(self) -> bytes:
        return json.dumps([os.getpid(), self.registered]).encode()

    def meet(self, connection: int, description: bytes) -> None:
        if self.refuses:
            raise LibraryError("it does not want to")
        process, registered = json.loads(description)
        self.met[connection] = (process, registered)

    def forget(self, connection: int) -> None:
        self.met.pop(connection, None)

    def begin(self, connection: int, rows: Rows) -> object:
        if connection not in self.met:
            raise LibraryError("who is that?")
        process, registered = self.met[connection]
        for _, address, length in rows.tolist():
            if not any(a <= address and address + length <= a + n for a, n in registered):
                raise LibraryError(f"{length} bytes at {address} are not the peer's")
        self.reads += 1
        return [self.slow, process, rows]

    def has_ended(self, read: object) -> bool:
        assert isinstance(read, list)
        read[0] -= 1
        if read[0] > 0:
            return False
        if self.fails:
            raise LibraryError("it failed")
        _, process, rows = read
        try:
            with open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
                for here, there, length in rows.tolist():
                    into = (ctypes.c_char * length).from_address(here)
                    if os.preadv(memory.fileno(), [into], there) != length:
                        raise LibraryError("it came in part")
        except OSError as error:
            raise LibraryError(str(error)) from error
        return True

    def close(self) -> None:
        self.closed = True


class ThisMachineBackend(CarriedBackend):
    capabilities: ClassVar[Capabilities] = Capabilities(
        "this-machine", rank=99, crosses_nodes=True, pages=True, parts=True, protects=True, mode_changes=True
    )
    library_class: ClassVar[LibraryClass] = ThisMachine

    @property
    def library(self) -> ThisMachine:
        assert isinstance(self._library, ThisMachine)
        return self._library
